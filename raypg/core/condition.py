"""Conditions of alerts, such as ``avg_query_time_ms > 100 and queries_per_second > 1``: parsed here, never executed.

From weakest to strongest: ``or``, ``and``, ``not``, comparisons, ``+ -``, ``* /``, signs, parentheses. ``|| && !`` and
``× ÷ − ≤ ≥ ≠`` mean the same. A figure that is not known is NaN. What is compared with it, or divided by 0, is unknown,
and so is its opposite; ``unknown and false`` is false, ``unknown or true`` is true (as in SQL with NULL).
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from raypg.core.nearest import nearest
from raypg.errors import ConfigError, UnknownFigureError

__all__ = ["LONGEST", "MOST_NESTED", "Condition", "parse", "shown"]

LONGEST: Final = 500
"""Characters of a condition at most."""

MOST_NESTED: Final = 20
"""Parentheses, signs and ``not`` inside each other at most."""

Figures = Mapping[str, float]

_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_.]*)"
    r"|(?P<sign><=|>=|==|!=|&&|\|\||[-+*/()<>!=×÷−≤≥≠])"
)
_SAME = {"×": "*", "÷": "/", "−": "-", "≤": "<=", "≥": ">=", "≠": "!=", "&&": "and", "||": "or", "!": "not"}
_WORDS = frozenset({"and", "or", "not"})
_COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


class _Token(NamedTuple):
    kind: str  # "number", "name", "sign" (words too), "end"
    text: str
    at: int


@dataclass(frozen=True)
class _Number:
    value: Callable[[Figures], float]
    constant: bool


@dataclass(frozen=True)
class _Truth:
    verdict: Callable[[Figures], bool | None]


@dataclass(frozen=True)
class Condition:
    """A parsed condition.

    Attributes:
        text: as it was written.
        names: the figures in it, in order.
        is_bare: whether it compares nothing, and a threshold is meant.
    """

    text: str
    names: tuple[str, ...]
    is_bare: bool
    _verdict: Callable[[Figures], bool | None] = field(repr=False, compare=False)
    _value: Callable[[Figures], float] = field(repr=False, compare=False)

    def verdict(self, figures: Figures) -> bool | None:
        """Whether it is true; ``None`` if that depends on figures that are not known.

        Raises:
            KeyError: one of :attr:`names` is not in *figures*.
        """
        return self._verdict(figures)

    def value(self, figures: Figures) -> float:
        """What the first comparison compares: the side of it that is no mere number."""
        return self._value(figures)


def parse(text: str, known: Collection[str], threshold: float | None = None) -> Condition:
    """*text* as a condition.

    Args:
        known: the figures that there are.
        threshold: what *text* is to exceed if it is no comparison. Else one of the numbers that it compares with: a
            rule that says two things is refused.

    Raises:
        UnknownFigureError: it names a figure that is not *known*.
        ConfigError: it is no condition, or contradicts *threshold*; says where and why.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"condition: {len(text)} characters are too many, at most {LONGEST} are allowed")
    parser = _Parser(text, known)
    whole = parser.whole()
    if not parser.names:
        raise ConfigError(f"condition {text!r}: it names no figure; write e.g. avg_query_time_ms > 100")
    names = tuple(dict.fromkeys(parser.names))
    if isinstance(whole, _Number):
        if threshold is None:
            raise ConfigError(
                f"condition {text!r}: it compares nothing; give a threshold, or write e.g. {text.strip()} > 100"
            )
        return Condition(text, names, True, _comparison(">", whole, _constant(threshold)).verdict, whole.value)
    numbers = [number.value({}) for _, number in parser.compared if number is not None]
    if threshold is not None and not any(math.isclose(number, threshold) for number in numbers):
        has = f"it compares with {', '.join(map(shown, numbers))}" if numbers else "it compares with no number"
        raise ConfigError(f"condition {text!r}: {has}, but threshold is {shown(threshold)}; leave out one of the two")
    return Condition(text, names, False, whole.verdict, parser.compared[0][0].value)


def shown(value: float) -> str:
    """A figure as people read it."""
    if math.isfinite(value) and (value == int(value) or abs(value) >= 10_000):
        return f"{value:.0f}" if abs(value) < 1e15 else f"{value:g}"
    return "unknown" if math.isnan(value) else f"{value:.4g}"


class _Parser:
    def __init__(self, text: str, known: Collection[str]) -> None:
        self._text = text
        self._known = known
        self._tokens = list(self._split())
        self._next = 0
        self._nested = 0
        self.names: list[str] = []
        self.compared: list[tuple[_Number, _Number | None]] = []  # what, and the mere number that it is compared with

    def whole(self) -> _Number | _Truth:
        found = self._any()
        if self._token.kind != "end":
            raise self._wrong("an operator or the end")
        return found

    # --- tokens ---

    def _split(self) -> list[_Token]:
        tokens, at = [], 0
        while at < len(self._text):
            if self._text[at].isspace():
                at += 1
                continue
            match = _TOKEN.match(self._text, at)
            if match is None or match.lastgroup is None:
                raise ConfigError(f"condition {self._text!r}: {self._text[at]!r} has no meaning (character {at + 1})")
            kind, text = match.lastgroup, match[0]
            text = _SAME.get(text, text)
            if kind == "name" and text.lower() in _WORDS:
                text = text.lower()
            tokens.append(_Token("sign" if text in _WORDS else kind, text, at))
            at = match.end()
        return [*tokens, _Token("end", "", at)]

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, *signs: str) -> str | None:
        """The next token, if it is one of these."""
        token = self._token
        if token.kind != "sign" or token.text not in signs:
            return None
        self._next += 1
        return token.text

    def _wrong(self, expected: str) -> ConfigError:
        token = self._token
        if token.text == "=":
            return ConfigError(f"condition {self._text!r}: write == to compare (character {token.at + 1})")
        found = f"{token.text!r} (character {token.at + 1})" if token.kind != "end" else "its end"
        return ConfigError(f"condition {self._text!r}: expected {expected}, found {found}")

    # --- from weakest to strongest ---

    def _any(self) -> _Number | _Truth:
        return self._joined("or", self._all, decisive=True)

    def _all(self) -> _Number | _Truth:
        return self._joined("and", self._not, decisive=False)

    def _joined(self, word: str, operand: Callable[[], _Number | _Truth], decisive: bool) -> _Number | _Truth:
        """Operands with *word* between them; one that is *decisive* is enough."""
        first = operand()
        if self._token.text != word:
            return first
        parts = [self._truth(first).verdict]
        while self._take(word):
            parts.append(self._truth(operand()).verdict)
        return _Truth(_decided(parts, decisive))

    def _not(self) -> _Number | _Truth:
        if not self._take("not"):
            return self._compared()
        return _Truth(_opposite(self._truth(self._inside(self._not)).verdict))

    def _compared(self) -> _Number | _Truth:
        left = self._sum()
        sign = self._take(*_COMPARISONS)
        if sign is None:
            return left
        left, right = self._number(left), self._number(self._sum())
        if self._token.text in _COMPARISONS:
            raise ConfigError(f"condition {self._text!r}: comparisons cannot be chained; write a < b and b < c")
        if left.constant and right.constant:
            raise ConfigError(f"condition {self._text!r}: it compares two numbers; one side must name a figure")
        what, number = (right, left) if left.constant else (left, right if right.constant else None)
        self.compared.append((what, number))
        return _comparison(sign, left, right)

    def _sum(self) -> _Number | _Truth:
        return self._chain("+", "-", self._product, _added)

    def _product(self) -> _Number | _Truth:
        return self._chain("*", "/", self._signed, _multiplied)

    def _chain(
        self,
        plain: str,
        inverse: str,
        operand: Callable[[], _Number | _Truth],
        combined: Callable[[list[tuple[bool, Callable[[Figures], float]]]], Callable[[Figures], float]],
    ) -> _Number | _Truth:
        """Operands between two signs of equal strength: one node for all, so that a long chain is not deep."""
        first = operand()
        if self._token.text not in (plain, inverse):
            return first
        numbers = [(False, self._number(first))]
        while sign := self._take(plain, inverse):
            numbers.append((sign == inverse, self._number(operand())))
        value = combined([(inverted, number.value) for inverted, number in numbers])
        return _Number(value, all(number.constant for _, number in numbers))

    def _signed(self) -> _Number | _Truth:
        sign = self._take("-", "+")
        if sign is None:
            return self._atom()
        number = self._number(self._inside(self._signed))
        value = number.value
        return _Number((lambda figures: -value(figures)) if sign == "-" else value, number.constant)

    def _atom(self) -> _Number | _Truth:
        token = self._token
        if self._take("("):
            found = self._inside(self._any)
            if not self._take(")"):
                raise self._wrong("')'")
            return found
        if token.kind == "number":
            self._next += 1
            if not math.isfinite(float(token.text)):
                raise ConfigError(f"condition {self._text!r}: {token.text} is too large")
            return _constant(float(token.text))
        if token.kind == "name":
            self._next += 1
            if token.text not in self._known:
                raise UnknownFigureError(self._text, token.text, sorted(self._known), nearest(token.text, self._known))
            self.names.append(token.text)
            return _Number(operator.itemgetter(token.text), False)
        raise self._wrong("a figure, a number or '('")

    # --- kinds ---

    def _inside(self, part: Callable[[], _Number | _Truth]) -> _Number | _Truth:
        self._nested += 1
        if self._nested > MOST_NESTED:
            raise ConfigError(f"condition {self._text!r}: it is nested more than {MOST_NESTED} deep")
        found = part()
        self._nested -= 1
        return found

    def _number(self, part: _Number | _Truth) -> _Number:
        if isinstance(part, _Truth):
            raise ConfigError(
                f"condition {self._text!r}: a comparison is no number, nothing can be done with its value"
            )
        return part

    def _truth(self, part: _Number | _Truth) -> _Truth:
        if isinstance(part, _Number):
            raise ConfigError(
                f"condition {self._text!r}: and, or, not stand between comparisons; write e.g. queue_depth > 0"
            )
        return part


def _constant(value: float) -> _Number:
    return _Number(lambda _: value, True)


def _comparison(sign: str, left: _Number, right: _Number) -> _Truth:
    holds = _COMPARISONS[sign]

    def verdict(figures: Figures) -> bool | None:
        a, b = left.value(figures), right.value(figures)
        return None if math.isnan(a) or math.isnan(b) else holds(a, b)

    return _Truth(verdict)


def _added(numbers: list[tuple[bool, Callable[[Figures], float]]]) -> Callable[[Figures], float]:
    def value(figures: Figures) -> float:
        total = 0.0
        for inverted, number in numbers:
            total += -number(figures) if inverted else number(figures)
        return total

    return value


def _multiplied(numbers: list[tuple[bool, Callable[[Figures], float]]]) -> Callable[[Figures], float]:
    def value(figures: Figures) -> float:
        product = 1.0
        for inverted, number in numbers:
            factor = number(figures)
            if not inverted:
                product *= factor
            else:
                product = product / factor if factor else math.nan
        return product

    return value


def _decided(parts: list[Callable[[Figures], bool | None]], decisive: bool) -> Callable[[Figures], bool | None]:
    def verdict(figures: Figures) -> bool | None:
        found = [part(figures) for part in parts]
        return decisive if decisive in found else None if None in found else not decisive

    return verdict


def _opposite(verdict: Callable[[Figures], bool | None]) -> Callable[[Figures], bool | None]:
    def opposite(figures: Figures) -> bool | None:
        found = verdict(figures)
        return None if found is None else not found

    return opposite
