"""What a statement may do, read from its text alone. Conservative: *read* only when proven, else *write*.

The proof is of the syntax tree that PostgreSQL's own parser gives: one plain SELECT, VALUES or TABLE without
INTO, locking clause or data-modifying CTE, made of node types known here, calling only functions known here
(:mod:`raypg.core.functions`). What a text cannot show is taken on trust: that views, row-level policies,
casts, operators without a schema, domain checks and overloads of the user do not write.

The parser is C and recursive: about 130 bytes of stack for each two bytes of ``1+1+1…``, and seconds for
nested comments. A long text would kill the process, so texts above ``LONGEST`` are only scanned.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Final, Literal

import pgparse

from raypg.core import functions
from raypg.core.sql_text import blank, first_word, highest_parameter, statement_count

__all__ = ["LONGEST", "Kind", "Verdict", "classify", "classify_under", "command_of", "shorten", "words"]

Kind = Literal["read", "write", "transaction", "utility", "empty", "invalid"]

LONGEST: Final = 16 * 1024  # characters: 1.1 MB of stack at worst, where a thread usually has 8
_LONGEST_TO_NORMALIZE: Final = 4 * 1024  # normalising takes three times as much stack as parsing
_MOST_COMMENTS: Final = 100  # the lexer is quadratic in nested ones: 8,000 of them take 0.3 s
_CACHE_ENTRIES: Final = 2048
_CACHE_CHARACTERS: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a text.

    Attributes:
        kind: ``read`` (proven), ``write`` (may change data), ``transaction`` (BEGIN, COMMIT, SAVEPOINT …:
            needs a lease), ``utility`` (everything else), ``empty``, or ``invalid`` (our parser refuses it:
            the server shall word the error, or know the newer syntax).
        command: what the first statement is, in capitals: ``SELECT``, ``INSERT``, ``CREATE TABLE`` …
        statements: how many there are; for ``invalid`` and overlong texts counted by semicolons.
        retryable: to run it twice does no harm.
        clean: it cannot have changed the state of the session.
        insert_values: an INSERT of one row of VALUES that ``executemany`` may group with others of the same
            text: nothing in the text depends on other rows or on when the transaction began. Defaults,
            triggers and rules of the table are not in the text.
        returning: INSERT, UPDATE, DELETE or MERGE with RETURNING.
        parameters: the highest ``$n``; 0 without any.
        relations: of a read, what it names as tables, quoted as PostgreSQL would quote them; a view among them may
            hide what this text does not show.
        reason: why it is not a read; empty if it is.
    """

    kind: Kind
    command: str
    statements: int = 1
    retryable: bool = False
    clean: bool = False
    insert_values: bool = False
    returning: bool = False
    parameters: int = 0
    relations: tuple[str, ...] = ()
    reason: str = ""


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


EXPRESSION_TAGS: Final = words("""
    A_ArrayExpr A_Const A_Expr A_Indices A_Indirection BitString BoolExpr Boolean BooleanTest CaseExpr
    CaseWhen CoalesceExpr CollateClause Float FuncCall Integer List MinMaxExpr NamedArgExpr NullTest ParamRef
    RowExpr SQLValueFunction SetToDefault String TypeCast TypeName
""")
READ_TAGS: Final = EXPRESSION_TAGS | words("""
    A_Star Alias CTECycleClause CTESearchClause ColumnDef ColumnRef CommonTableExpr GroupingFunc GroupingSet
    JoinExpr JsonAggConstructor JsonArgument JsonArrayAgg JsonArrayConstructor JsonArrayQueryConstructor
    JsonBehavior JsonFormat JsonFuncExpr JsonIsPredicate JsonKeyValue JsonObjectAgg JsonObjectConstructor
    JsonOutput JsonParseExpr JsonReturning JsonScalarExpr JsonSerializeExpr JsonTable JsonTableColumn
    JsonTablePathSpec JsonValueExpr RangeFunction RangeSubselect RangeTableFunc RangeTableFuncCol
    RangeTableSample RangeVar ResTarget SelectStmt SortBy SubLink WindowDef WithClause XmlExpr XmlSerialize
""")
SAMPLING_METHODS: Final = words("bernoulli system")
# Those of SQLValueFunction that do not depend on the clock.
CLOCKLESS_VALUES: Final = words("""
    SVFOP_CURRENT_CATALOG SVFOP_CURRENT_ROLE SVFOP_CURRENT_SCHEMA SVFOP_CURRENT_USER SVFOP_SESSION_USER
    SVFOP_USER
""")
# 'now'::timestamptz and its like are the clock too; a text that merely has the word is not worth the risk.
CLOCK_WORDS: Final = re.compile(r"\b(?:now|today|tomorrow|yesterday)\b", re.IGNORECASE)
GROUPABLE_FUNCTIONS: Final = functions.PURE - functions.CLOCK

_WRITES: Final = {
    "SelectStmt": "SELECT",
    "InsertStmt": "INSERT",
    "UpdateStmt": "UPDATE",
    "DeleteStmt": "DELETE",
    "MergeStmt": "MERGE",
    "CopyStmt": "COPY",
    "TruncateStmt": "TRUNCATE TABLE",
    "CallStmt": "CALL",
    "DoStmt": "DO",
    "ExecuteStmt": "EXECUTE",
}
_UTILITIES: Final = {
    "CheckPointStmt": "CHECKPOINT",
    "ClosePortalStmt": "CLOSE CURSOR",
    "ClusterStmt": "CLUSTER",
    "ConstraintsSetStmt": "SET CONSTRAINTS",
    "CreateStmt": "CREATE TABLE",
    "CreateTableAsStmt": "CREATE TABLE AS",
    "CreatedbStmt": "CREATE DATABASE",
    "DropdbStmt": "DROP DATABASE",
    "FetchStmt": "FETCH",
    "IndexStmt": "CREATE INDEX",
    "LockStmt": "LOCK TABLE",
    "RefreshMatViewStmt": "REFRESH MATERIALIZED VIEW",
    "RenameStmt": "ALTER",
    "RuleStmt": "CREATE RULE",
    "VariableShowStmt": "SHOW",
    "ViewStmt": "CREATE VIEW",
}
_TRANSACTION_WORDS: Final = words("BEGIN START COMMIT END ROLLBACK ABORT SAVEPOINT RELEASE")
_WRITE_WORDS: Final = words("WITH VALUES TABLE TRUNCATE") | frozenset(_WRITES.values())

_cache: OrderedDict[str, Verdict] = OrderedDict()
_cached_characters = 0
_cache_lock = Lock()


def classify(sql: str) -> Verdict:
    """Say what a text may do. Cached by text; never raises on bad SQL.

    Raises:
        TypeError: it is not a string.
    """
    verdict = _cache.get(sql) if type(sql) is str else None
    if verdict is not None:
        try:
            _cache.move_to_end(sql)
        except KeyError:
            pass  # another thread has just evicted it
        return verdict
    if not isinstance(sql, str):
        raise TypeError(f"SQL must be a str, not {type(sql).__name__}")
    text = str(sql)  # the parser refuses subclasses
    if not may_be_parsed(text):
        return _scanned(text)
    verdict = _parsed(text)
    _remember(text, verdict)
    return verdict


def classify_under(sql: str, settings: Iterable[tuple[str, str]] | None) -> Verdict:
    """The verdict on a text that runs with these PostgreSQL settings, as (name, value)."""
    verdict = classify(sql)
    if settings and any(name == "search_path" and "pg_catalog" in value for name, value in settings):
        # What looks like a function of pg_catalog may be anybody's.
        verdict = replace(verdict, clean=False, retryable=False)
    return verdict


def shorten(sql: str, limit: int = 200) -> str:
    """The text without literals and comments, on one line, for error messages and logs.

    Of a text that cannot be parsed, or has more than 4,096 characters, only the first word is shown: a literal
    may hide anywhere in it.

    Args:
        sql: any text.
        limit: most characters to return.
    """
    normal: str | None = None
    if may_be_parsed(sql) and len(sql) <= _LONGEST_TO_NORMALIZE:
        try:
            normal = pgparse.normalize(str(sql))
        except (pgparse.PGQueryError, UnicodeEncodeError):
            pass
    if normal is None:
        word = first_word(sql)
        short = f"{word} …" if word else "…"
    else:
        # Not every literal is normalised (COPY … FROM '/path', for one), and no comment.
        short = " ".join(blank(normal, literal="'…'").split())
    return short if len(short) <= limit else short[: max(limit - 1, 0)] + "…"


def may_be_parsed(sql: str) -> bool:
    return len(sql) <= LONGEST and "\0" not in sql and sql.count("/*") <= _MOST_COMMENTS


def _remember(sql: str, verdict: Verdict) -> None:
    global _cached_characters
    with _cache_lock:
        if sql not in _cache:
            _cache[sql] = verdict
            _cached_characters += len(sql)
        while len(_cache) > _CACHE_ENTRIES or _cached_characters > _CACHE_CHARACTERS:
            evicted, _ = _cache.popitem(last=False)
            _cached_characters -= len(evicted)


def _scanned(sql: str) -> Verdict:
    """The verdict on a text that the parser is not shown, or could not hold."""
    if "\0" in sql:
        # The parser stops at a NUL, and the server refuses the message.
        return Verdict("invalid", first_word(sql), reason="the text contains a NUL character")
    word = first_word(sql)
    kind: Kind = "transaction" if word in _TRANSACTION_WORDS else "write" if word in _WRITE_WORDS else "utility"
    return Verdict(
        kind,
        word,
        statements=statement_count(sql),
        parameters=highest_parameter(sql),
        reason="the text is too long or too deeply nested to be proven a read",
    )


def _parsed(sql: str) -> Verdict:
    try:
        nodes: list[dict[str, Any]] = [raw["stmt"] for raw in pgparse.parse(sql)]
    except RecursionError:
        return _scanned(sql)
    except (pgparse.PGQueryError, UnicodeEncodeError):
        # Not the parser's message: it quotes the text, and with it perhaps a literal.
        return Verdict(
            "invalid",
            first_word(sql),
            statements=statement_count(sql),
            parameters=highest_parameter(sql),
            reason="it is not valid SQL, or newer than raypg's parser",
        )
    if not nodes:
        return Verdict("empty", "", statements=0, retryable=True, clean=True)
    verdicts = [_of_node(node) for node in nodes]
    if len(verdicts) == 1:
        return verdicts[0]
    return Verdict(
        "transaction" if any(v.kind == "transaction" for v in verdicts) else "write",
        verdicts[0].command,
        statements=len(verdicts),
        parameters=max(v.parameters for v in verdicts),
        reason=f"{len(verdicts)} statements in one text",
    )


def _of_node(node: dict[str, Any]) -> Verdict:
    ((tag, body),) = node.items()
    if tag == "TransactionStmt":
        command = command_of(tag, body)
        # These two end somebody's prepared transaction, and are refused inside one.
        kind: Kind = "utility" if command in ("COMMIT PREPARED", "ROLLBACK PREPARED") else "transaction"
        return Verdict(kind, command, reason=f"{command} is not a query")
    if tag == "VariableShowStmt":
        return Verdict("read", "SHOW", retryable=True, clean=True)
    doubt, parameters = inspect_tree(node, READ_TAGS, functions.READ)
    if tag == "SelectStmt":
        if not doubt:
            return Verdict(
                "read", "SELECT", retryable=True, clean=True, parameters=parameters, relations=relations_in(node)
            )
        command = "SELECT INTO" if "intoClause" in body else "SELECT"
        return Verdict("write", command, parameters=parameters, reason=doubt)
    if tag == "ExplainStmt":
        doubt, _ = inspect_tree(body["query"], READ_TAGS, functions.READ)
        if not doubt and any(option["DefElem"]["defname"] == "analyze" for option in body.get("options", ())):
            doubt = "EXPLAIN ANALYZE executes"
        if not doubt:
            return Verdict("read", "EXPLAIN", retryable=True, clean=True, parameters=parameters)
        return Verdict("utility", "EXPLAIN", parameters=parameters, reason=doubt)
    command = command_of(tag, body)
    return Verdict(
        "write" if tag in _WRITES else "utility",
        command,
        insert_values=tag == "InsertStmt" and _inserts_one_row_of_values(body),
        returning="returningList" in body or "returningClause" in body,
        parameters=parameters,
        reason=f"{command} is not a query",
    )


def command_of(tag: str, body: dict[str, Any]) -> str:
    """What a statement is called, in capitals: its node's name in the tree, and what is below it."""
    if tag in _WRITES:
        return _WRITES[tag]
    if tag == "TransactionStmt":
        command: str = body["kind"].removeprefix("TRANS_STMT_").replace("_", " ")
        return {"START": "START TRANSACTION", "PREPARE": "PREPARE TRANSACTION"}.get(command, command)
    if tag == "VariableSetStmt":
        return "RESET" if body.get("kind") in ("VAR_RESET", "VAR_RESET_ALL") else "SET"
    return _UTILITIES.get(tag) or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", tag.removesuffix("Stmt")).upper()


def _inserts_one_row_of_values(insert: dict[str, Any]) -> bool:
    if any(key in insert for key in ("onConflictClause", "returningList", "returningClause", "withClause")):
        return False
    select = insert.get("selectStmt", {}).get("SelectStmt", {})
    # limitOption and op are always there; anything else (ORDER BY, LIMIT, WITH …) is more than VALUES.
    if not select.keys() <= {"valuesLists", "limitOption", "op"} or len(select.get("valuesLists", ())) != 1:
        return False
    doubt, _ = inspect_tree(select["valuesLists"], EXPRESSION_TAGS, GROUPABLE_FUNCTIONS, clock=False)
    return not doubt


def inspect_tree(
    root: object, tags: frozenset[str], callable_: frozenset[str], *, clock: bool = True
) -> tuple[str, int]:
    """Walk a tree without recursion.

    Args:
        root: a tree of the parser.
        tags: node types that are fine.
        callable_: functions that are fine.
        clock: whether values that depend on the clock are fine.

    Returns:
        The first doubt found (empty if all is fine), and the highest parameter number.
    """
    doubt = ""
    parameters = 0
    todo: list[Any] = [root]
    while todo:
        node = todo.pop()
        if type(node) is list:
            todo.extend(node)
            continue
        if type(node) is not dict:
            continue
        for key, value in node.items():
            if key in _CHECKED:
                if key == "ParamRef":
                    parameters = max(parameters, value.get("number", 0))
                    continue
                if not doubt:
                    doubt = _doubt(key, value, callable_, clock)
            elif "A" <= key[0] <= "Z" and key not in tags and not doubt:
                doubt = f"{LABELS.get(key, key)} in it"
            if type(value) is dict or type(value) is list:
                todo.append(value)
    return doubt, parameters


# Keys whose value decides; the others are judged by their name alone, or are harmless attributes.
_CHECKED: Final = words("ParamRef FuncCall A_Const SQLValueFunction intoClause name operName useOp method")
LABELS: Final = {
    "LockingClause": "a locking clause",
    "InsertStmt": "an INSERT",
    "UpdateStmt": "an UPDATE",
    "DeleteStmt": "a DELETE",
    "MergeStmt": "a MERGE",
}


def relations_in(root: object) -> tuple[str, ...]:
    """What a tree names as tables (names of WITH queries among them), each once."""
    found: dict[str, None] = {}
    todo: list[Any] = [root]
    while todo:
        node = todo.pop()
        if type(node) is list:
            todo.extend(node)
        elif type(node) is dict:
            relation = node.get("RangeVar")
            if type(relation) is dict:
                parts = [relation[key] for key in ("schemaname", "relname") if relation.get(key)]
                found[".".join('"' + part.replace('"', '""') + '"' for part in parts)] = None
            todo.extend(value for value in node.values() if type(value) is dict or type(value) is list)
    return tuple(found)


def _doubt(key: str, value: Any, callable_: frozenset[str], clock: bool) -> str:
    if key == "FuncCall":
        name = names_in(value["funcname"])
        if len(name) == 1:
            known = name[0] in callable_
        else:
            known = len(name) == 2 and name[0] == "pg_catalog" and (name[1] in callable_ or name[1] in functions.NEWER)
        return "" if known else f"function {'.'.join(name)} is not known to be harmless"
    if key == "intoClause":
        return "it creates a table"
    if key == "method" and isinstance(value, list):  # of TABLESAMPLE
        name = names_in(value)
        known = name[-1] in SAMPLING_METHODS and name[:-1] in ([], ["pg_catalog"])
        return "" if known else f"sampling method {'.'.join(name)} is not known"
    if key in ("name", "operName", "useOp") and isinstance(value, list):  # of an operator
        name = names_in(value)
        return "" if name[:-1] in ([], ["pg_catalog"]) else f"operator of schema {name[0]}"
    if not clock:
        if key == "SQLValueFunction" and value.get("op") not in CLOCKLESS_VALUES:
            return "it depends on the clock"
        if key == "A_Const" and CLOCK_WORDS.search(value.get("sval", {}).get("sval", "")):
            return "it may depend on the clock"
    return ""


def names_in(parts: list[dict[str, Any]]) -> list[str]:
    """The parts of a name in a tree."""
    return [part.get("String", {}).get("sval", "") for part in parts]
