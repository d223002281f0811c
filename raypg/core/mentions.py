"""What a text says of itself: of which kind it is, and the names of all that it uses.

The first half of classification, which needs no catalogue. Whether what is named writes, :mod:`raypg.core.facts` and
:mod:`raypg.core.classifier` say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import pgparse

from raypg.core import sql
from raypg.core.sql import names_in, words

__all__ = ["Kind", "Mentions", "Name", "mentions"]

Kind = Literal["READ", "WRITE", "DDL", "TRANSACTION", "SESSION", "UNKNOWN"]
"""``READ``: any server has the same answer, and nothing is left behind. ``WRITE``: changes or locks data. ``DDL``:
changes the schema, privileges, or the files of the server. ``TRANSACTION``: BEGIN, COMMIT, SAVEPOINT … ``SESSION``:
about one session or one server: its settings, locks, cursors, statistics. ``UNKNOWN``: cannot be told."""

Name: TypeAlias = "tuple[str, str]"
"""(schema or empty, name)."""

_WRITES: Final = words("""
    InsertStmt UpdateStmt DeleteStmt MergeStmt CopyStmt TruncateStmt CallStmt DoStmt NotifyStmt LockStmt
""")
_SESSION: Final = words("""
    ClosePortalStmt ConstraintsSetStmt DeallocateStmt DeclareCursorStmt DiscardStmt ExecuteStmt FetchStmt ListenStmt
    LoadStmt PrepareStmt UnlistenStmt VariableSetStmt VariableShowStmt
""")
_CHANGES: Final = words("InsertStmt UpdateStmt DeleteStmt MergeStmt")
_EXPLAINED: Final = _CHANGES | words("SelectStmt")
_READ_TAGS: Final = sql.READ_TAGS
# What a plan that is only shown may hold beside: nothing of it runs.
_PLAN_TAGS: Final = (
    _READ_TAGS
    | _CHANGES
    | words("InferClause IndexElem LockingClause MergeWhenClause MultiAssignRef OnConflictClause ReturningClause")
)
# They change though no statement writes to the table: FREEZE, CLUSTER, row locks.
_SYSTEM_COLUMNS: Final = words("ctid xmin xmax cmin cmax")
_COMPLEX: Final = frozenset(("JoinExpr", "groupClause", "havingClause", "SubLink", "RangeSubselect", "WithClause"))


@dataclass(frozen=True, slots=True)
class Mentions:
    """What a text says.

    Attributes:
        kind: what it is; a ``READ`` is one only if all that it names allows it.
        command: its first statement, in capitals: ``SELECT``, ``CREATE TABLE`` …
        reason: why it is no read; empty if it may be one.
        functions, relations: what it calls and reads.
        written: the tables that its INSERT, UPDATE, DELETE, MERGE, TRUNCATE or COPY names as targets; of DDL, some of
            those that it is about.
        ctes: names of its WITH queries, which may stand among ``relations``.
        operators, types: their names, without schemas.
        attributes: fields with something before the dot, as ``a.b``: they may be calls of a function ``b``.
        steady: the text has neither chance nor the clock in it, nor where and by whom rows are stored.
        bulk: INSERT … SELECT or of many rows, UPDATE or DELETE of a whole table, COPY, TRUNCATE.
        complexity: 0 to 1, by what a plan takes most trouble with: joins, groups, subqueries.
        statements: how many there are.
    """

    kind: Kind
    command: str = ""
    reason: str = ""
    functions: frozenset[Name] = frozenset()
    relations: tuple[Name, ...] = ()
    written: tuple[Name, ...] = ()
    ctes: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    steady: bool = True
    bulk: bool = False
    complexity: float = 0.0
    statements: int = 1


def mentions(text: str) -> Mentions:
    """Read *text*; never raises on bad SQL. Some 50 to 150 µs, most of it PostgreSQL's parser."""
    if not sql.may_be_parsed(text):
        why = "the text contains a NUL character" if "\0" in text else "it is too long or too deeply nested to be read"
        return Mentions("UNKNOWN", reason=why, statements=0)
    try:
        nodes: list[dict[str, Any]] = [raw["stmt"] for raw in pgparse.parse(text)]
    except RecursionError:
        return Mentions("UNKNOWN", reason="it is too deeply nested to be read", statements=0)
    except (pgparse.PGQueryError, UnicodeEncodeError):
        # Not the parser's message: it quotes the text, and with it perhaps a literal.
        return Mentions("UNKNOWN", reason="it is not valid SQL, or newer than raypg's parser", statements=0)
    if not nodes:
        return Mentions("UNKNOWN", reason="it holds no statement", statements=0)
    if len(nodes) > 1:
        kind: Kind = "TRANSACTION" if any("TransactionStmt" in node for node in nodes) else "UNKNOWN"
        return Mentions(kind, reason=f"{len(nodes)} statements in one text", statements=len(nodes))
    return statement(nodes[0])


def statement(node: dict[str, Any]) -> Mentions:
    """The same of one statement of a tree."""
    ((tag, body),) = node.items()
    if tag == "ExplainStmt":
        return _explain(body)
    walk = _Walk(_READ_TAGS, node)
    command = sql.command_of(tag, body)
    if tag == "SelectStmt":
        if "intoClause" in body:
            return walk.told("DDL", "SELECT INTO", "it creates a table")
        return walk.told(walk.kind, command, walk.doubt)
    if tag in _WRITES:
        if tag == "TruncateStmt":
            walk.written = {_name(relation["RangeVar"]): None for relation in body["relations"]}
        elif tag == "CopyStmt" and not body.get("is_from") and "query" not in body:
            walk.relations |= walk.written
            walk.written = {}
        return walk.told("WRITE", command, f"{command} writes", bulk=_is_bulk(tag, body))
    if tag in _SESSION:
        return walk.told("SESSION", command, f"{command} is about one session")
    if tag == "TransactionStmt":
        return walk.told("TRANSACTION", command, f"{command} is about a transaction")
    return walk.told("DDL", command, f"{command} changes the schema or the server")


def _explain(body: dict[str, Any]) -> Mentions:
    ((tag, query),) = body["query"].items()
    runs = any(_is_on(option["DefElem"]) for option in body.get("options", ()))
    if runs or tag not in _EXPLAINED:
        inner = statement(body["query"])
        kind, reason = inner.kind, inner.reason
        if runs and reason:
            reason = f"EXPLAIN ANALYZE executes: {reason}"
        elif not runs and kind != "SESSION":
            kind, reason = "UNKNOWN", f"EXPLAIN of {inner.command}"
        return replace(inner, kind=kind, command="EXPLAIN", reason=reason, steady=False)
    walk = _Walk(_PLAN_TAGS, body["query"])
    # Plans of changes are only made on the server that would run them, if their tables allow it.
    walk.relations |= walk.written
    walk.written = {}
    walk.steady = False
    kind = walk.kind if "intoClause" not in query else "UNKNOWN"
    return walk.told(kind, "EXPLAIN", walk.doubt or ("" if kind == "READ" else "EXPLAIN of SELECT INTO"))


def _is_on(option: dict[str, Any]) -> bool:
    """Whether it is ANALYZE, switched on."""
    if option["defname"] != "analyze":
        return False
    value = option.get("arg", {})
    text = str(value.get("String", {}).get("sval", value.get("Boolean", {}).get("boolval", "true"))).lower()
    if "Integer" in value:
        return bool(value["Integer"].get("ival", 0))
    return text not in ("false", "off", "0", "no", "f")


def _is_bulk(tag: str, body: dict[str, Any]) -> bool:
    if tag == "InsertStmt":
        select = body.get("selectStmt", {}).get("SelectStmt", {})
        return len(select.get("valuesLists", ())) != 1 and bool(select)
    return tag in ("CopyStmt", "TruncateStmt") or (tag in ("UpdateStmt", "DeleteStmt") and "whereClause" not in body)


def _name(relation: dict[str, Any]) -> Name:
    return relation.get("schemaname", ""), relation["relname"]


class _Walk:
    """One walk over a tree, without recursion."""

    def __init__(self, tags: frozenset[str], root: dict[str, Any]) -> None:
        self.kind: Kind = "READ"
        self.doubt = ""
        self.functions: set[Name] = set()
        self.relations: dict[Name, None] = {}
        self.written: dict[Name, None] = {}
        self.ctes: set[str] = set()
        self.operators: set[str] = set()
        self.types: set[str] = set()
        self.attributes: set[str] = set()
        self.steady = True
        self.weight = 0.0
        self._walk(tags, root)

    def told(self, kind: Kind, command: str, reason: str, bulk: bool = False) -> Mentions:
        return Mentions(
            kind,
            command,
            reason,
            frozenset(self.functions),
            tuple(self.relations),
            tuple(self.written),
            frozenset(self.ctes),
            frozenset(self.operators),
            frozenset(self.types),
            frozenset(self.attributes),
            self.steady,
            bulk,
            min(1.0, 0.1 + 0.1 * self.weight),
        )

    def _walk(self, tags: frozenset[str], root: dict[str, Any]) -> None:
        todo: list[Any] = [root]
        push, pop = todo.append, todo.pop
        while todo:
            node = pop()
            if type(node) is list:
                todo += node
                continue
            if type(node) is not dict:
                continue
            for key, value in node.items():
                kind = type(value)
                if key in _SPECIAL:
                    if not _SPECIAL[key](self, value, node):
                        continue
                elif key[0] < "[" and key not in tags and not self.doubt:  # a capital: the tag of a node
                    self._doubt_tag(key)
                if key in _COMPLEX:
                    self.weight += 1.0
                if kind is dict or kind is list:
                    push(value)

    def _doubt_tag(self, tag: str) -> None:
        self.kind = "WRITE" if tag in _CHANGES or tag == "LockingClause" else "UNKNOWN"
        self.doubt = f"{sql.LABELS.get(tag, tag)} in it"

    # What follows answers whether to look further below the value.

    def _column(self, value: dict[str, Any], _: dict[str, Any]) -> bool:
        fields = value["fields"]
        name = fields[-1].get("String", {}).get("sval", "")
        if len(fields) > 1:
            self.attributes.add(name)
        if name in _SYSTEM_COLUMNS:
            self.steady = False
        return False

    def _indirection(self, value: list[dict[str, Any]], _: dict[str, Any]) -> bool:
        names = {field["String"]["sval"] for field in value if "String" in field}
        self.attributes |= names
        self.steady = self.steady and names.isdisjoint(_SYSTEM_COLUMNS)
        return True

    def _relation(self, value: dict[str, Any], _: dict[str, Any]) -> bool:
        self.relations[_name(value)] = None
        return False

    def _target(self, value: Any, _: dict[str, Any]) -> bool:
        """Of INSERT, UPDATE, DELETE, MERGE: the only ones whose ``relation`` has no tag of its own."""
        if type(value) is dict and "relname" in value:
            self.written[_name(value)] = None
            return False
        return True

    def _call(self, value: dict[str, Any], _: dict[str, Any]) -> bool:
        name = names_in(value["funcname"])
        self.functions.add(("", name[0]) if len(name) == 1 else (name[-2], name[-1]))
        return True

    def _cte(self, value: dict[str, Any], _: dict[str, Any]) -> bool:
        self.ctes.add(value["ctename"])
        return True

    def _type(self, value: list[dict[str, Any]], _: dict[str, Any]) -> bool:
        self.types.add(value[-1].get("String", {}).get("sval", ""))
        return False

    def _operator(self, value: Any, _: dict[str, Any]) -> bool:
        if type(value) is list:
            self.operators.add(names_in(value)[-1])
            return False
        return True

    def _constant(self, value: dict[str, Any], _: dict[str, Any]) -> bool:
        text = value.get("sval")
        if text and self.steady and sql.CLOCK_WORDS.search(text.get("sval", "")):
            self.steady = False
        return False

    def _value(self, value: dict[str, Any], _: dict[str, Any]) -> bool:
        if value.get("op") not in sql.CLOCKLESS_VALUES:
            self.steady = False
        return False

    def _sample(self, value: list[dict[str, Any]], _: dict[str, Any]) -> bool:
        self.steady = False
        if type(value) is not list:
            return True
        name = names_in(value)
        if (name[-1] not in sql.SAMPLING_METHODS or name[:-1] not in ([], ["pg_catalog"])) and not self.doubt:
            self.kind, self.doubt = "UNKNOWN", f"sampling method {'.'.join(name)} is not known"
        return False

    def _limit(self, _: Any, node: dict[str, Any]) -> bool:
        if "sortClause" not in node:
            self.steady = False
        return True

    def _into(self, _: Any, __: dict[str, Any]) -> bool:
        if not self.doubt:
            self.kind, self.doubt = "DDL", "it creates a table"
        return False

    def _skip(self, _: Any, __: dict[str, Any]) -> bool:
        return False


_SPECIAL: Final[dict[str, Callable[[_Walk, Any, dict[str, Any]], bool]]] = {
    "ColumnRef": _Walk._column,
    "indirection": _Walk._indirection,
    "RangeVar": _Walk._relation,
    "relation": _Walk._target,
    "FuncCall": _Walk._call,
    "funcname": _Walk._skip,
    "CommonTableExpr": _Walk._cte,
    "names": _Walk._type,
    "name": _Walk._operator,
    "operName": _Walk._operator,
    "useOp": _Walk._operator,
    "A_Const": _Walk._constant,
    "SQLValueFunction": _Walk._value,
    "method": _Walk._sample,
    "limitCount": _Walk._limit,
    "limitOffset": _Walk._limit,
    "intoClause": _Walk._into,
    "ParamRef": _Walk._skip,
}
