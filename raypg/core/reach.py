"""Which tables a statement may write to, as far as its text and the catalogue say; all that cannot be told may be any.

A write to a table reaches further than its text: to the other partitions of the table (all are one family, named by
its head, see :class:`raypg.core.facts.Facts`), by cascading foreign keys, and by the functions of triggers, rules,
defaults, checks, indexes and policies; any statement by those of operators, casts, domains, and defaults of arguments.
What a function writes to: of language ``sql``, its statements say that. Of ``plpgsql``, its words do: a table that it
writes to is named in it, unless it makes up statements (``EXECUTE``), changes the schema, or has quoted names in it.
Any other function that is volatile may write to anything.

Results are names of tables, see :func:`shown`; ``EVERYTHING``: to any table; ``CATALOGUE``: to any table, and it may
change the catalogue too. Both are of :mod:`raypg.core.coherence`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeAlias

import pgparse

from raypg.core.coherence import EVERYTHING
from raypg.core.facts import Facts, Trouble
from raypg.core.holding import CATALOGUE
from raypg.core.mentions import Mentions, Name, mentions, statement
from raypg.core.sql import may_be_parsed, words
from raypg.core.sql_text import blank, mask, quoted_name

__all__ = ["ANYTHING", "Reach", "shown"]

Tables: TypeAlias = "frozenset[str]"

NOTHING: Final[Tables] = frozenset()
ANY_TABLE: Final[Tables] = frozenset((EVERYTHING,))
ANYTHING: Final[Tables] = frozenset((CATALOGUE,))

_RUN_SQL: Final = words("""
    cursor_to_xml cursor_to_xmlschema database_to_xml database_to_xml_and_xmlschema database_to_xmlschema query_to_xml
    query_to_xml_and_xmlschema query_to_xmlschema schema_to_xml schema_to_xml_and_xmlschema schema_to_xmlschema
    table_to_xml table_to_xml_and_xmlschema table_to_xmlschema ts_rewrite ts_stat
    connectby crosstab crosstab2 crosstab3 crosstab4 crosstab_hash xpath_table dblink dblink_open dblink_exec
""")
"""Functions that run SQL which they are given. No other one of the system's writes to a table of a user."""

_HARMLESS: Final = words("""
    uuid_generate_v1 uuid_generate_v1mc uuid_generate_v4 gen_random_bytes gen_random_uuid gen_salt pgp_sym_encrypt
    pgp_sym_encrypt_bytea pgp_pub_encrypt pgp_pub_encrypt_bytea
""")
"""Functions of contrib that are volatile only because they are random."""

_NO_DATA: Final = frozenset(
    ("SHOW", "SET", "RESET", "DISCARD", "DEALLOCATE", "CLOSE CURSOR", "SET CONSTRAINTS", "LISTEN", "UNLISTEN", "NOTIFY")
) | {"VACUUM", "CHECKPOINT", "LOCK TABLE", "PREPARE", "FETCH"}
"""Commands that change no data of a table, whatever they name. FETCH and MOVE: what the query of a cursor reaches, its
DECLARE does, or the function that opened it, and so its transaction until that ends; WITH HOLD it has run by then."""

_QUERIES: Final = frozenset(("SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "COPY", "TRUNCATE TABLE", "EXPLAIN")) | {
    "DECLARE CURSOR"
}
"""Commands of which what they name and call is all that they may touch."""

_WORD: Final = re.compile(r"[A-Za-z_\u0080-\uffff][\w$]*")
_DO: Final = re.compile(r"\bdo\b(?!\s+(?:nothing|update)\b)", re.IGNORECASE)
_WRITES: Final = words("insert update delete merge truncate")
_MAKES_UP: Final = words("""
    execute create alter drop grant revoke refresh call import comment reindex cluster security copy load prepare
    reassign vacuum
""")


def shown(schema: str, name: str) -> str:
    """A table as verdicts and caches name it."""
    return quoted_name(schema, name)


class Reach:
    """What statements may write to, given one state of the catalogue.

    Args:
        facts: of the catalogue.
        rows: what :mod:`raypg.server.facts_reader` has read: ``relations``, ``functions``, and ``triggers``
            (schema, name, function_schema, function), ``cascades`` (schema, name, to_schema, to_name: who changes when
            the first is changed), ``rules`` (schema, name), ``uses`` (schema, name, function_schema, function),
            ``events`` (function_schema, function: of event triggers).
    """

    def __init__(self, facts: Facts, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        self._facts = facts
        self._functions: dict[Name, Tables] = {}
        self._named: dict[str, list[str]] = {}
        self._tables: dict[Name, Tables] = {}
        self._views: dict[Name, Tables] = {}
        self._operators: dict[Name, Tables] = {}
        self._types: dict[Name, Tables] = {}
        self._events = frozenset((row["function_schema"], row["function"]) for row in rows.get("events", ()))
        self._steps: list[tuple[dict[Name, Tables], Name, Callable[[], Tables]]] = []
        self._take_functions(rows["functions"])
        self._take_operators_and_types(rows)
        self._take_relations(rows)
        changed = True
        while changed:
            changed = False
            for found, key, work in self._steps:
                tables = found[key] | work()
                if CATALOGUE in tables:
                    tables = ANYTHING
                if tables != found[key]:
                    found[key] = tables
                    changed = True
        self._steps.clear()

        self._triggers = frozenset((row["function_schema"], row["function"]) for row in rows["triggers"])

    def calls(self, schema: str, name: str) -> bool:
        """Whether a trigger of some table calls that function."""
        return (schema, name) in self._triggers

    # --- what a statement reaches ---

    def of(self, text: str) -> Tables:
        """The tables that *text*, of one statement or of several, may write to. Never raises on bad SQL."""
        if not may_be_parsed(text):
            return ANYTHING
        try:
            nodes: list[dict[str, Any]] = [raw["stmt"] for raw in pgparse.parse(text)]
        except (RecursionError, pgparse.PGQueryError, UnicodeEncodeError):
            return ANYTHING
        found = NOTHING
        for node in nodes:
            ((tag, body),) = node.items()
            if _executes(node):
                found |= self._of_execute()
            elif tag in ("CreateStmt", "CreateTableAsStmt") and _is_temporary(body) and not self._facts.distrust:
                found |= _united(self.of_call(*name) for name in self._events)
                found |= NOTHING if tag == "CreateStmt" else self._named_in(statement(node))
            else:
                found |= self.of_mentions(statement(node), cascades=_cascades(body))
        return found

    def of_mentions(self, said: Mentions, cascades: bool = False) -> Tables:
        """The same of one statement that has been read."""
        command = said.command
        if self._facts.distrust or not said.statements:
            return ANYTHING
        if said.kind == "TRANSACTION":
            return ANYTHING if command == "COMMIT PREPARED" else NOTHING
        if command in _NO_DATA:
            return NOTHING
        if command not in _QUERIES or said.kind == "DDL" or cascades:
            return ANYTHING
        return self._named_in(said)

    def _named_in(self, said: Mentions) -> Tables:
        facts, found = self._facts, NOTHING
        for schema, name in said.written:
            found |= self.of_table(schema, name)
        for schema, name in said.functions:
            found |= self.of_call(schema, name)
        for schema, name in said.relations:
            found |= self._of_reading(schema, name)
        for name in said.attributes:  # a.name may be name(a)
            found |= self.of_call("", name)
        return (
            found
            | self._of_operators(said.operators & facts.operators.keys())
            | self._of_types(said.types | {name for _, name in said.functions})
        )

    def _of_execute(self) -> Tables:
        """What a prepared statement may reach, whose text is not to be seen. It changes no catalogue by itself: only a
        function that it calls might."""
        if self._facts.distrust or any(CATALOGUE in tables for tables in self._functions.values()):
            return ANYTHING
        return ANY_TABLE

    def _of_operators(self, names: Iterable[str]) -> Tables:
        return _united(self._operators.get(("", name), ANYTHING) for name in names)

    def _of_types(self, names: Tables) -> Tables:
        """What runs when values of these types are made. If any of them is not harmless, or made of one that is not:
        what runs for any type."""
        return NOTHING if names.isdisjoint(self._facts.types) else _united(self._types.values())

    def of_table(self, schema: str, name: str) -> Tables:
        """What a write to that table, in any schema if none is given, may reach."""
        found = NOTHING
        for relation in (known := self._facts.relation(schema, name)):
            found |= self._tables.get((relation.schema, name), NOTHING)
        return found if known else ANY_TABLE

    def of_call(self, schema: str, name: str) -> Tables:
        """What a call of that function may reach. One that is not known does not exist."""
        if name in _RUN_SQL:
            return ANYTHING
        found = NOTHING
        for own in (schema,) if schema else self._named.get(name, ()):
            found |= self._functions.get((own, name), NOTHING)
        return found

    def _of_reading(self, schema: str, name: str) -> Tables:
        found = NOTHING
        for relation in self._facts.relation(schema, name):
            found |= self._views.get((relation.schema, name), NOTHING)
        return found

    # --- functions ---

    def _take_functions(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            key = row["schema"], row["name"]
            self._named.setdefault(row["name"], []).append(row["schema"])
            self._functions.setdefault(key, NOTHING)
            work = self._function(row)
            if work is not None:
                self._steps.append((self._functions, key, work))
            if row["defaults"]:
                text = f"SELECT {row['defaults']}"
                self._steps.append((self._functions, key, functools.partial(self.of, text)))
            if row["types"]:
                types = frozenset(row["types"])
                self._steps.append((self._functions, key, functools.partial(self._of_types, types)))

    def _function(self, row: Mapping[str, Any]) -> Callable[[], Tables] | None:
        language, source, name = row["language"], row["source"], row["name"]
        if row["kind"] == "a":
            calls = row["calls"] or ()
            return lambda: _united(self.of_call(schema, called) for schema, called in calls)
        if name in _HARMLESS or (row["volatility"] != "v" and language in ("c", "internal") and name not in _RUN_SQL):
            return None
        if language == "sql" and source:
            text = _body(source)
            return lambda: self.of(text)
        if language == "plpgsql" and source and '"' not in blank(source):
            code = mask(source)
            used = frozenset(word.lower() for word in _WORD.findall(code))
            if not used & _MAKES_UP and not _DO.search(code):
                return lambda: self._words(used, code)
        return lambda: ANYTHING

    def _take_operators_and_types(self, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """What is behind them: functions of operators, casts and operator classes, checks of domains."""
        for row in rows["operators"]:
            self._take_call(self._operators, ("", row["name"]), row)
        for row in (*rows["casts"], *rows["classes"]):
            self._take_call(self._types, ("", row["type"] or row["target"]), row)
        for row in rows["domains"]:
            key = "", row["name"]
            self._types.setdefault(key, NOTHING)
            for check in row["checks"]:
                self._steps.append((self._types, key, functools.partial(self.of, f"SELECT {check}")))

    def _take_call(self, found: dict[Name, Tables], key: Name, row: Mapping[str, Any]) -> None:
        found.setdefault(key, NOTHING)
        self._steps.append((found, key, functools.partial(self.of_call, row["schema"], row["function"])))

    def _words(self, used: Tables, code: str) -> Tables:
        """What a body in ``plpgsql`` may reach by its words."""
        facts = self._facts
        found = self._of_types(used)
        found |= self._of_operators(operator for operator in facts.operators if operator in code)
        writes = bool(used & _WRITES)
        for word in used:
            found |= self.of_call("", word)
            if word in facts.relations:
                found |= self.of_table("", word) if writes else self._of_reading("", word)
        return found

    # --- tables and views ---

    def _take_relations(self, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        called: dict[Name, set[Name]] = {}
        for row in (*rows["triggers"], *rows["uses"]):
            called.setdefault((row["schema"], row["name"]), set()).add((row["function_schema"], row["function"]))
        follow: dict[Name, set[Name]] = {}
        for row in rows["cascades"]:
            follow.setdefault((row["schema"], row["name"]), set()).add((row["to_schema"], row["to_name"]))
        ruled = {(row["schema"], row["name"]) for row in rows["rules"]}
        members: dict[Name, set[Name]] = {}
        for member, head in self._facts.families.items():
            members.setdefault(head, set()).update((member, head))
        for row in rows["relations"]:
            key: Name = row["schema"], row["name"]
            if row["kind"] == "S":
                self._tables[key] = NOTHING
                continue
            if row["kind"] == "v":
                self._take_view(row, key, called.get(key, set()), key in ruled)
                continue
            head = self._facts.families.get(key, key)
            family = members.get(head, {key})
            self._tables[key] = frozenset((shown(*head),))
            trouble = _trouble(self._facts, key)
            if not family.isdisjoint(ruled) or (trouble and trouble.kind != "SESSION" and not row["parts"]):
                self._tables[key] = ANYTHING
            elif row["kind"] == "f":
                self._tables[key] = ANY_TABLE  # it may lead back to this very database
            else:
                functions = set().union(*(called.get(member, ()) for member in family))
                if row["policies"] is not None:
                    self._views[key] = NOTHING
                    self._steps.append((self._views, key, _table(self, functions, ())))
                others = set().union(*(follow.get(member, ()) for member in family)) - family
                if functions or others:
                    self._steps.append((self._tables, key, _table(self, functions, others)))

    def _take_view(self, row: Mapping[str, Any], key: Name, functions: set[Name], ruled: bool) -> None:
        """Reading it runs what its definition calls; writing to it writes to the tables behind it, or does what its
        triggers do."""
        said = mentions(row["definition"]) if row["definition"] else None
        self._views[key], self._tables[key] = NOTHING, ANYTHING if ruled else NOTHING
        if said is None:
            return  # the system's own
        relations = [name for name in said.relations if name[0] or name[1] not in said.ctes]
        self._steps.append((self._views, key, lambda: self.of_mentions(said)))
        self._steps.append((self._tables, key, _table(self, functions, relations)))


def _table(reach: Reach, functions: Iterable[Name], others: Iterable[Name]) -> Callable[[], Tables]:
    return lambda: (
        _united(reach.of_call(*name) for name in functions) | _united(reach.of_table(*name) for name in others)
    )


def _trouble(facts: Facts, key: Name) -> Trouble | None:
    """What is against reading that table."""
    return next((relation.trouble for relation in facts.relation(*key)), None)


def _united(parts: Iterable[Tables]) -> Tables:
    return NOTHING.union(*parts)


def _body(source: str) -> str:
    """The statements of a function of language ``sql``."""
    text = source.strip()
    if text[:12].upper() == "BEGIN ATOMIC" and text[-3:].upper() == "END":
        return text[12:-3]
    return f"SELECT {text[7:]}" if text[:7].upper() == "RETURN " else text


def _cascades(body: Mapping[str, Any]) -> bool:
    """Whether a TRUNCATE takes along tables that it does not name."""
    return body.get("behavior") == "DROP_CASCADE"


def _executes(node: Mapping[str, Any]) -> bool:
    """Whether it runs a statement that was prepared before."""
    while True:
        ((tag, body),) = node.items()
        if tag not in ("ExplainStmt", "CreateTableAsStmt") or (tag == "CreateTableAsStmt" and not _is_temporary(body)):
            return tag == "ExecuteStmt"
        node = body["query"]


def _is_temporary(body: Mapping[str, Any]) -> bool:
    """Whether a CREATE TABLE makes a table of one session, which is part of no other."""
    relation = body.get("relation") or body.get("into", {}).get("rel", {})
    return relation.get("relpersistence") == "t" and "inhRelations" not in body
