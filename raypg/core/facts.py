"""What the catalogue knows of everything that a statement may name: whether reading or calling it is only a read.

:mod:`raypg.core.facts_building` makes them. Names are looked up without regard to the search_path and to types: if
anything of a name is not harmless, the name is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from raypg.core import functions
from raypg.core.mentions import Kind, Mentions, Name

__all__ = ["NOT_KNOWN", "Facts", "Function", "Judgement", "Relation", "Trouble", "judge"]


NOT_KNOWN: Final = "is not known"
"""How the reason ends where the catalogue has nothing of a name: it may just have been made."""


class Trouble(NamedTuple):
    """Why something is no read, and of which kind a statement is that uses it."""

    kind: Kind
    reason: str


class Relation(NamedTuple):
    """Attributes: trouble; bases: the tables behind it, as (schema, name); steady: without chance and clock."""

    schema: str
    trouble: Trouble | None
    bases: tuple[Name, ...]
    steady: bool


class Function(NamedTuple):
    """Attributes: trouble; steady: the same answer as long as the data are the same; bases: the tables it reads."""

    schema: str
    trouble: Trouble | None
    steady: bool
    bases: tuple[Name, ...] = ()


class Judgement(NamedTuple):
    """Of what a text mentions: kind and reason, the tables behind what it reads, and whether it is deterministic."""

    kind: Kind
    reason: str
    bases: tuple[Name, ...] = ()
    steady: bool = False


@dataclass(slots=True)
class Facts:
    """What is known of one database.

    Attributes:
        relations, functions: by bare name; all but the system's for functions.
        builtin: names of functions of ``pg_catalog``: whether each is immutable in all its forms.
        operators, types: by bare name, those that are not harmless.
        unsteady: names of operators and types behind which are functions that are not steady, or read tables; an empty
            one among them: any statement may come by such a function.
        families: of tables that are partitions, inherit, or are inherited from: the head of their family, which stands
            for all of them wherever it is said which tables a read came from.
        distrust: why nothing can be proven; empty as a rule.
    """

    relations: dict[str, tuple[Relation, ...]] = field(default_factory=dict)
    functions: dict[str, tuple[Function, ...]] = field(default_factory=dict)
    builtin: Mapping[str, bool] = field(default_factory=dict)
    operators: dict[str, Trouble] = field(default_factory=dict)
    types: dict[str, Trouble] = field(default_factory=dict)
    unsteady: frozenset[str] = frozenset()
    families: dict[Name, Name] = field(default_factory=dict)
    distrust: str = ""

    def call(self, schema: str, name: str) -> tuple[Trouble | None, bool]:
        """Whether a call of *name* is harmless, and steady."""
        known = self.function(schema, name)
        steady = True
        for function in known:
            if function.trouble:
                return function.trouble, False
            steady = steady and function.steady
        if schema == "information_schema":
            return None, False
        if name in self.builtin and schema in ("", "pg_catalog"):
            immutable = self.builtin[name]
            return builtin_trouble(name, immutable), steady and (immutable or name in functions.STEADY)
        if known:
            return None, steady
        shown = f"{schema}.{name}" if schema else name
        return Trouble("UNKNOWN", f"function {shown} {NOT_KNOWN}"), False

    def function(self, schema: str, name: str) -> tuple[Function, ...]:
        """All functions but the system's that this may be."""
        known = self.functions.get(name, ())
        return tuple(function for function in known if function.schema == schema) if schema else known

    def read_by(self, schema: str, name: str) -> Iterator[Name]:
        """The tables that a call of *name* reads."""
        for function in self.function(schema, name):
            yield from function.bases

    def relation(self, schema: str, name: str) -> tuple[Relation, ...]:
        """All relations that this may be."""
        known = self.relations.get(name, ())
        return tuple(relation for relation in known if relation.schema == schema) if schema else known


_HARMLESS: Final = functions.READ | functions.NEWER | functions.NEWER_VOLATILE
_WRITE_BUILTIN: Final = functions.FORBIDDEN - functions.LOCAL


def builtin_trouble(name: str, immutable: bool) -> Trouble | None:
    """What is against a function of ``pg_catalog``."""
    if name in functions.LOCAL or name.startswith("pg_stat_get_"):
        return Trouble("SESSION", f"function {name} is about one session or one server")
    if immutable or name in _HARMLESS:
        return None
    if name in _WRITE_BUILTIN:
        return Trouble("WRITE", f"function {name} is not harmless")
    return Trouble("UNKNOWN", f"function {name} is not known to be harmless")


def judge(text: Mentions, facts: Facts) -> Judgement:
    """What a text is, given what is known of all that it mentions."""
    if text.kind != "READ":
        return Judgement(text.kind, text.reason, text.relations)
    if facts.distrust:
        return Judgement("UNKNOWN", facts.distrust)
    steady = text.steady
    bases: dict[Name, None] = {}
    for schema, name in sorted(text.functions):  # the same reason every time
        trouble, constant = facts.call(schema, name)
        if trouble:
            return Judgement(trouble.kind, trouble.reason)
        steady = steady and constant
        bases |= dict.fromkeys(facts.read_by(schema, name))
    for schema, name in text.relations:
        found = facts.relation(schema, name)
        if not found and (schema or name not in text.ctes):
            return Judgement("UNKNOWN", f"relation {name} {NOT_KNOWN}")
        for relation in found:
            if relation.trouble:
                return Judgement(relation.trouble.kind, f"{name}: {relation.trouble.reason}")
            steady = steady and relation.steady
            bases |= dict.fromkeys(relation.bases)
    called = {name for _, name in text.functions} if facts.types or facts.unsteady else set()  # domain(a) is a cast
    for tainted, names in ((facts.operators, text.operators), (facts.types, text.types | called)):
        if tainted and (common := names & tainted.keys()):
            return Judgement(*tainted[min(common)])
    if facts.unsteady and ("" in facts.unsteady or facts.unsteady & (text.operators | text.types | called)):
        steady = False
    for name in sorted(text.attributes & functions.FORBIDDEN):
        return Judgement("WRITE", f"a field {name} may be a call of the function")
    for name in sorted(text.attributes):
        for function in facts.functions.get(name, ()):
            if function.trouble:  # a.name may be name(a)
                return Judgement(function.trouble.kind, function.trouble.reason)
            steady = steady and function.steady
            bases |= dict.fromkeys(function.bases)
    return Judgement("READ", "", tuple(bases), steady)
