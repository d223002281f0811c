"""How the facts of a catalogue are found: what taints what.

From plain rows (:mod:`raypg.server.facts_reader` fetches them). A function that writes taints whatever uses it:
operators, casts, domains and their columns, views, policies, and other functions. Starting from the belief that all is
harmless, what is not is marked until nothing changes any more.

How functions are judged. Of language ``sql``: by what their text does, whatever they are declared to be. ``plpgsql``,
declared stable or immutable: PostgreSQL lets them run no statement that writes, so what remains is what they call, and
their words say that; with ``EXECUTE`` or quoted names they are not trusted. C: as declared, but for those that run SQL
which they are given. All others are taken to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from raypg.core import functions
from raypg.core.facts import Facts, Function, Judgement, Relation, Trouble, judge
from raypg.core.mentions import Mentions, Name, mentions
from raypg.core.sql import words
from raypg.core.sql_text import blank, mask

__all__ = ["build", "seeds"]

_RUN_SQL: Final = words("""
    connectby crosstab crosstab2 crosstab3 crosstab4 crosstab_hash xpath_table dblink dblink_open dblink_exec
""")
"""Functions of contrib that are declared stable, and run SQL that they are given."""

_COMPARISONS: Final = frozenset(("=", "<>", "<", "<=", ">", ">="))
_WORD: Final = re.compile(r"[A-Za-z_\u0080-\uffff][\w$]*")
_CALL: Final = re.compile(r"(?:([A-Za-z_][\w$]*)\s*\.\s*)?([A-Za-z_][\w$]*)\s*\(")
_BLOCK_WORDS: Final = words("""
    and all any array as between by case cast coalesce cube else elsif end exists filter from greatest grouping having
    if in int into is join lateral least limit not notice null nullif numeric on or order over partition perform
    exception precision decimal varchar char bit time timestamp interval using values
    return rollup row select sets some then trim union until varying when where while with within xmlelement xmlforest
    xmlconcat xmlparse xmlpi xmlroot xmlserialize json_array json_arrayagg json_exists json_objectagg json_query
    json_scalar json_serialize json_value json_table extract position substring overlay treat normalize
""")


class _Item:
    """Something whose trouble is to be found: its name, what it mentions, and what it uses beside."""

    __slots__ = ("calls", "fixed", "judgement", "name", "own", "schema", "steady", "texts", "types", "words")

    def __init__(self, schema: str, name: str, fixed: Trouble | None = None, steady: bool = True) -> None:
        self.schema = schema
        self.name = name
        self.fixed = fixed
        self.steady = steady
        self.texts: list[Mentions] = []
        self.calls: list[Name] = []
        self.words = ""
        self.own: tuple[Name, ...] = ()
        self.types: Sequence[str] = ()
        self.judgement = Judgement(fixed.kind, fixed.reason) if fixed else Judgement("READ", "", (), steady)

    @property
    def trouble(self) -> Trouble | None:
        found = self.judgement
        return None if found.kind == "READ" else Trouble(found.kind, found.reason)

    def look(self, facts: Facts) -> bool:
        """Judge again; whether anything changed."""
        if self.judgement.kind != "READ":
            return False  # for good; the reasons of two that call each other would change for ever
        before, self.judgement = self.judgement, self._judged(facts)
        return before != self.judgement

    def _judged(self, facts: Facts) -> Judgement:
        steady = self.steady
        bases = dict.fromkeys(self.own)
        for name in self.types:
            if name in facts.types:
                return Judgement(*facts.types[name])
        for schema, called in self.calls:
            trouble, constant = facts.call(schema, called)
            if trouble:
                return Judgement(*trouble)
            steady = steady and constant
            bases |= dict.fromkeys(facts.read_by(schema, called))
        for text in self.texts:
            found = judge(text, facts)
            if found.kind != "READ":
                return found
            steady = steady and found.steady
            bases |= dict.fromkeys(found.bases)
        if self.words:
            trouble = _trouble_in_words(self.words, facts)
            if trouble:
                return Judgement(*trouble)
            steady = steady and not _names_relation(self.words, facts)
        return Judgement("READ", "", tuple(bases), steady)


def build(rows: Mapping[str, Iterable[Mapping[str, Any]]], tainted: Mapping[str, Any] | None = None) -> Facts:
    """The facts in these rows.

    Args:
        rows: ``settings``, ``builtin``, ``relations``, ``functions``, ``operators``, ``casts``, ``domains``,
            ``classes``, ``inherits``; see :mod:`raypg.server.facts_reader`.
        tainted: of earlier rounds, for each type that is not harmless, what it is part of: ``(types, relations)`` by
            name. :func:`seeds` says for which types it is wanted.
    """
    facts = Facts(builtin={row["name"]: row["immutable"] for row in rows["builtin"]})
    for row in rows["settings"]:
        if row["strings"] != "on":
            # Then a backslash may hide the end of a string from us: 'a\\', nextval('s') --'
            facts.distrust = "standard_conforming_strings is off, so texts mean something else to the server"
    facts.families = _families(rows.get("inherits", ()))
    relations = [_relation_item(row, facts.families) for row in rows["relations"]]
    called = [_function_item(row) for row in rows["functions"]]
    operators, types = _operator_items(rows), _type_items(rows)
    items = [*called, *operators, *types, *relations]
    by_relation = _grouped(relations)
    by_function = _grouped(called)
    changed = True
    while changed:
        _publish(facts, by_relation, by_function, operators, types, tainted or {})
        changed = False
        for item in items:
            changed = item.look(facts) or changed
    return facts


def seeds(facts: Facts) -> frozenset[str]:
    """Names of the types that are not harmless."""
    return frozenset(facts.types)


def _grouped(items: Iterable[_Item]) -> dict[str, list[_Item]]:
    found: dict[str, list[_Item]] = {}
    for item in items:
        found.setdefault(item.name, []).append(item)
    return found


def _publish(
    facts: Facts,
    relations: Mapping[str, list[_Item]],
    called: Mapping[str, list[_Item]],
    operators: Iterable[_Item],
    types: Iterable[_Item],
    tainted: Mapping[str, Any],
) -> None:
    """Let *facts* say what is known so far."""
    for operator in operators:
        if operator.trouble:
            facts.operators[operator.name] = operator.trouble
            if operator.name in _COMPARISONS:
                facts.distrust = f"an operator {operator.name} is not harmless: {operator.trouble.reason}"
    spoilt: dict[str, Trouble] = {}
    for kind in types:
        if kind.trouble is None:
            continue
        if kind.schema:  # a cast between types of the system happens anywhere
            facts.distrust = f"a cast is not harmless: {kind.trouble.reason}"
        facts.types[kind.name] = kind.trouble
        more_types, more_relations = tainted.get(kind.name, ((), ()))
        facts.types |= dict.fromkeys(more_types, kind.trouble)
        spoilt |= dict.fromkeys(more_relations, kind.trouble)
    behind = [item for item in (*operators, *types) if not item.judgement.steady or item.judgement.bases]
    facts.unsteady = frozenset("" if item.schema else item.name for item in behind)
    facts.functions = {
        name: tuple(Function(item.schema, item.trouble, item.judgement.steady, item.judgement.bases) for item in items)
        for name, items in called.items()
    }
    facts.relations = {
        name: tuple(
            Relation(
                item.schema,
                item.trouble or spoilt.get(name),
                item.judgement.bases or ((item.schema, name),),
                item.judgement.steady,
            )
            for item in items
        )
        for name, items in relations.items()
    }


_KINDS: Final = {
    "f": Trouble("UNKNOWN", "it is a foreign table"),
    "S": Trouble("SESSION", "it is a sequence, which is ahead on a replica"),
}
_PERSISTENCE: Final = {
    "u": Trouble("SESSION", "it is an unlogged table, which replicas do not have"),
}


def _families(rows: Iterable[Mapping[str, Any]]) -> dict[Name, Name]:
    """The head of the family of each table that has one: of those without a parent the first by name."""
    joined: dict[Name, set[Name]] = {}
    children: set[Name] = set()
    for row in rows:
        child, parent = (row["schema"], row["name"]), (row["parent_schema"], row["parent"])
        children.add(child)
        family = joined.get(child, {child}) | joined.get(parent, {parent})
        for member in family:
            joined[member] = family
    heads = {id(family): min(family - children or family) for family in joined.values()}
    return {member: heads[id(family)] for member, family in joined.items()}


def _relation_item(row: Mapping[str, Any], families: Mapping[Name, Name]) -> _Item:
    name: str = row["name"]
    trouble = _KINDS.get(row["kind"]) or _PERSISTENCE.get(row["persistence"])
    if row["parts"]:
        trouble = Trouble("UNKNOWN", "a part of it is a foreign or unlogged table")
    if row["schema"] == "pg_catalog" and (
        name in functions.LOCAL_RELATIONS or name.startswith(("pg_stat_", "pg_statio_"))
    ):
        trouble = Trouble("SESSION", "it is about one session or one server")
    item = _Item(row["schema"], name, trouble, steady=row["policies"] is None)  # policies depend on who asks
    if row["definition"]:
        item.texts.append(mentions(row["definition"]))
    else:
        item.own = (families.get((row["schema"], name), (row["schema"], name)),)
    item.texts += [mentions(f"SELECT {policy}") for policy in row["policies"] or ()]
    return item


def _function_item(row: Mapping[str, Any]) -> _Item:
    schema, name, language = row["schema"], row["name"], row["language"]
    volatility, source = row["volatility"], row["source"]
    harmful = Trouble("WRITE", f"function {name} may write")
    item = _Item(schema, name)
    item.types = row["types"] or ()
    item.calls = [(called[0], called[1]) for called in row["calls"] or ()]
    if row["defaults"]:
        item.texts.append(mentions(f"SELECT {row['defaults']}"))
    if row["kind"] == "a":
        return item
    if row["kind"] == "p" or name in _RUN_SQL:
        item.fixed = harmful
    elif language in ("c", "internal") and volatility != "v":
        item.steady = volatility == "i"
    elif language == "sql" and source:
        item.texts += _sql_body(source)
    elif language == "plpgsql" and volatility != "v" and source:
        item.words = source
        item.steady = volatility == "i"
    else:
        item.fixed = harmful
    if item.fixed:
        item.judgement = Judgement(*item.fixed)
    return item


def _sql_body(source: str) -> list[Mentions]:
    """The statements of a function of language ``sql``; of one that cannot be read, an ``UNKNOWN``."""
    text = source.strip()
    if text[:12].upper() == "BEGIN ATOMIC" and text[-3:].upper() == "END":
        text = text[12:-3]
    elif text[:7].upper() == "RETURN ":
        text = f"SELECT {text[7:]}"
    return split(text)


def split(text: str) -> list[Mentions]:
    """What each of several statements mentions."""
    masked = mask(text)
    found: list[Mentions] = []
    start = 0
    for end in [match.start() for match in re.finditer(";", masked)] + [len(text)]:
        if masked[start:end].strip():
            found.append(mentions(text[start:end]))
        start = end + 1
    return found


def _operator_items(rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[_Item]:
    found = []
    for row in rows["operators"]:
        item = _Item("", row["name"])
        item.calls = [(row["schema"], row["function"])]
        item.types = row["types"]
        found.append(item)
    return found


def _type_items(rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[_Item]:
    """Types, by what runs when their values are cast, checked or compared. One with a schema concerns all texts."""
    found = []
    for row in rows["casts"]:
        # Between types of the system: an implicit one happens anywhere, one by assignment in any function, an explicit
        # one names its target.
        everywhere = not row["type"] and row["context"] != "e"
        item = _Item("any" if everywhere else "", row["type"] or row["target"])
        item.calls = [(row["schema"], row["function"])]
        found.append(item)
    for row in rows["domains"]:
        item = _Item("", row["name"])
        item.texts = [mentions(f"SELECT {check}") for check in row["checks"]]
        found.append(item)
    for row in rows["classes"]:
        item = _Item("", row["type"])
        item.calls = [(row["schema"], row["function"])]
        found.append(item)
    return found


def _names_relation(source: str, facts: Facts) -> bool:
    """Whether a body in ``plpgsql`` may read a table, whatever it is declared to be."""
    return any(word.lower() in facts.relations for word in _WORD.findall(mask(source)))


def _trouble_in_words(source: str, facts: Facts) -> Trouble | None:
    """What is against a body in ``plpgsql``, read word by word."""
    code = mask(source)
    if '"' in blank(source):
        return Trouble("UNKNOWN", "a function has quoted names in it")
    called = {(schema.lower(), name.lower()) for schema, name in _CALL.findall(code)}
    used = {word.lower() for word in _WORD.findall(code)}
    if "execute" in used:
        return Trouble("WRITE", "a function executes texts")
    for operator, trouble in facts.operators.items():
        if operator in code:
            return trouble
    for word in sorted(used):
        if word in facts.types:
            return facts.types[word]
        found: list[Function | Relation] = [*facts.functions.get(word, ()), *facts.relations.get(word, ())]
        for known in found:
            if known.trouble:
                return known.trouble
    for schema, name in sorted(called):
        if name in _BLOCK_WORDS and not schema:
            continue
        against, _ = facts.call(schema, name)
        if against:
            return against
    return None
