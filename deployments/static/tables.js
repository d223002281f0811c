// What is told in tables: who waits for whom, statements, errors, workers, replicas, leases.

import { byId, choose, el, keyed, recall, remember, setAttribute, setText, Table } from "./dom.js";
import * as format from "./format.js";

const sum = (items, value) => items.reduce((total, item) => total + (value(item) ?? 0), 0);

// --- who waits for whom ---

/** Blockers first, below each who waits for it, with the depth; a session stands once. */
export function waitTree(sessions) {
  const byPid = new Map(sessions.map((session) => [session.pid, session]));
  const waiters = (pid) => sessions.filter((session) => (session.blocked_by ?? []).includes(pid));
  const rows = [];
  const seen = new Set();
  const visit = (session, depth) => {
    if (seen.has(session.pid)) return;
    seen.add(session.pid);
    rows.push({ ...session, depth, waiters: waiters(session.pid).length });
    waiters(session.pid)
      .sort((one, other) => (other.waiting_seconds ?? 0) - (one.waiting_seconds ?? 0))
      .forEach((waiter) => visit(waiter, depth + 1));
  };
  const isRoot = (session) => !(session.blocked_by ?? []).some((pid) => byPid.has(pid));
  sessions.filter(isRoot).forEach((session) => visit(session, 0));
  sessions.forEach((session) => visit(session, 0)); // those that wait for each other: a deadlock
  return rows;
}

const isWaiting = (session) => (session.blocked_by ?? []).length > 0;

export class Waits {
  constructor() {
    this.table = new Table(
      byId("waits-body"),
      "Sessions that wait for a lock, and those that hold it",
      [
        { title: "Session", class: "pid", fill: fillSession },
        { title: "Whose", text: whose, about: (session) => `${session.application ?? ""}, user ${session.user ?? "?"}, client ${session.client ?? "local"}` },
        { title: "What it does", fill: fillDoing },
        { title: "For", number: true, text: (session) => format.duration(isWaiting(session) ? session.waiting_seconds : session.seconds) },
        { title: "Statement", class: "sql", fill: fillQuery },
      ],
      { key: (session) => session.pid, empty: "", level: (session) => (isWaiting(session) ? null : "critical") },
    );
  }

  show(activity) {
    const rows = waitTree(activity?.sessions ?? []);
    const nothing = activity?.error ? `The server did not say: ${activity.error}` : activity ? "No session waits for a lock of another." : "Not known yet.";
    this.table.update(rows, nothing);
    const room = activity?.server_max_connections ? ` of ${format.number(activity.server_max_connections)}` : "";
    setText(byId("backends"), activity?.backends === undefined || activity.backends === null ? "" : `${format.number(activity.backends)}${room} connections of the server in use`);
  }
}

/** Of a pool's own sessions the application_name is raypg:…:worker:…, and then the caller's, or his job. */
function whose(session) {
  const [, , worker, , ...caller] = (session.application ?? "").split(":");
  if (session.ours && worker !== undefined) return `this pool, worker ${worker}${caller.length ? `, for ${caller.join(":")}` : ""}`;
  return session.application || session.user || "–";
}

function fillSession(cell, session) {
  cell.style.paddingInlineStart = `${0.75 + 1.25 * Math.min(session.depth, 8)}rem`;
  setText(cell, `${session.depth ? "↳ " : ""}${session.pid}`);
}

function fillDoing(cell, session) {
  const holds = session.waiters ? `blocks ${format.count(session.waiters, "session")}` : null;
  const waits = isWaiting(session) ? `waits for ${session.blocked_by.join(", ")}${session.wait_event ? ` (${session.wait_event})` : ""}` : session.state;
  setText(cell, [waits, holds].filter(Boolean).join(", "));
}

function fillQuery(cell, session) {
  if (cell.children.length === 0) cell.append(el("code"), el("small"));
  setText(cell.children[0], session.query || "–");
  // The way out, to be copied; the page itself ends nobody's session.
  setText(cell.children[1], isWaiting(session) || session.ours ? "" : `to end it: SELECT pg_terminate_backend(${session.pid})`);
}

// --- statements ---

const ORDERS = {
  now: (statement) => statement.busy ?? 0,
  total: (statement) => statement.total_ms ?? 0,
  slowest: (statement) => statement.p95_ms ?? 0,
  frequent: (statement) => statement.count ?? 0,
};

/** Rows of each order; there are more, of which some are first in another one. */
const SHOWN = 20;

/** Seconds that "now" is taken over. */
const OVER = 10;

export class Statements {
  constructor() {
    this.order = Object.hasOwn(ORDERS, recall("order") ?? "") ? recall("order") : "now";
    this.looks = new Map(); // pool → [{at, by fingerprint}]
    this.latest = null;
    byId("statement-order").addEventListener("click", (event) => this.choose(event.target.dataset.order));
    choose(byId("statement-order"), "order", this.order);
    this.table = new Table(
      byId("statements-body"),
      "Statements by fingerprint",
      [
        { title: "Statement", class: "sql", fill: fillStatement },
        { title: "Now /s", number: true, text: (row) => format.short(row.rate), hint: "calls per second, over the last 10 s" },
        { title: "Busy now", number: true, text: (row) => (row.busy === null ? "–" : format.number(row.busy, 2)), hint: "connections that it keeps busy: seconds of execution per second" },
        { title: "Calls", number: true, text: (row) => format.short(row.count), hint: "since the pool began" },
        { title: "Errors", number: true, text: (row) => format.short(row.errors) },
        { title: "Mean", number: true, text: (row) => format.ms(row.mean_ms) },
        { title: "p50", number: true, text: (row) => format.ms(row.p50_ms) },
        { title: "p95", number: true, text: (row) => format.ms(row.p95_ms) },
        { title: "p99", number: true, text: (row) => format.ms(row.p99_ms) },
        { title: "Total", number: true, text: (row) => format.ms(row.total_ms), hint: "time of all calls since the pool began" },
      ],
      { key: (row) => row.fingerprint, empty: "No statement ran yet." },
    );
  }

  choose(order) {
    if (order === undefined) return;
    this.order = order;
    remember("order", order);
    choose(byId("statement-order"), "order", order);
    if (this.latest) this.show(...this.latest);
  }

  show(name, statements, at) {
    this.latest = [name, statements, at];
    const before = this.before(name, statements ?? [], at);
    const rows = (statements ?? []).map((statement) => {
      const old = before?.by.get(statement.fingerprint);
      const seconds = old ? at - before.at : 0;
      const rate = seconds > 0 ? (statement.count - old.count) / seconds : null;
      const busy = seconds > 0 ? Math.max(0, (statement.total_ms - old.total_ms) / 1000 / seconds) : null;
      return { ...statement, rate, busy };
    });
    rows.sort((one, other) => ORDERS[this.order](other) - ORDERS[this.order](one) || other.total_ms - one.total_ms);
    this.table.update(rows.slice(0, SHOWN));
  }

  /** The look of some seconds ago; this one is kept for later. */
  before(name, statements, at) {
    const looks = this.looks.get(name) ?? [];
    this.looks.set(name, looks);
    if (looks.at(-1)?.at !== at) looks.push({ at, by: new Map(statements.map((one) => [one.fingerprint, one])) });
    while (looks.length > 2 && at - looks[1].at >= OVER) looks.shift();
    return looks.length > 1 ? looks[0] : null;
  }
}

function fillStatement(cell, row) {
  if (cell.children.length === 0) cell.append(el("code"), el("small"));
  setText(cell.children[0], row.text || row.command);
  setText(cell.children[1], `${row.command} · ${row.fingerprint}`);
  setAttribute(cell.children[0], "title", row.text);
}

// --- errors ---

export class Errors {
  constructor() {
    this.table = new Table(
      byId("errors-body"),
      "Latest errors",
      [
        { title: "When", class: "when", text: (error) => format.moment(error.at) },
        { title: "Category", text: (error) => format.words(error.category) },
        { title: "Error", fill: fillError },
        { title: "Statement", text: (error) => error.command ?? "", about: (error) => (error.fingerprint ? `fingerprint ${error.fingerprint}` : null) },
      ],
      { key: (error) => error.key, empty: "No error yet." },
    );
  }

  show(errors) {
    const categories = Object.entries(errors?.by_category ?? {});
    keyed(
      byId("error-categories"),
      categories,
      ([category]) => category,
      ([category]) => el("li", {}, el("b"), el("span", {}, format.words(category))),
      (item, [, total]) => {
        setText(item.children[0], format.short(total));
        setAttribute(item, "data-some", total > 0);
      },
    );
    setText(byId("errors-total"), `${format.number(sum(categories, ([, total]) => total))} since the pool began`);
    const recent = [...(errors?.recent ?? [])].sort((one, other) => other.at - one.at);
    const times = new Map();
    const rows = recent.map((error) => {
      const name = `${error.at} ${error.category} ${error.fingerprint}`;
      times.set(name, (times.get(name) ?? 0) + 1);
      return { ...error, key: `${name} ${times.get(name)}` };
    });
    this.table.update(rows);
  }
}

function fillError(cell, error) {
  if (cell.children.length === 0) cell.append(el("span"), " ", el("code"));
  setText(cell.children[0], error.message ?? "");
  setText(cell.children[1], error.sqlstate ?? "");
}

// --- workers ---

/** Ray's ids are long; the first characters tell nodes apart. */
const nodeName = (node) => (node ? String(node).slice(0, 8) : "–");

export class Workers {
  constructor() {
    this.table = new Table(
      byId("workers-body"),
      "Workers by node",
      [
        { title: "Node", text: (worker) => nodeName(worker.node), about: (worker) => worker.node },
        { title: "Worker", number: true, text: (worker) => worker.index },
        { title: "State", text: workerState },
        { title: "In use", number: true, text: (worker) => format.number(worker.active) },
        { title: "Open", number: true, text: (worker) => format.number(worker.total) },
        { title: "May open", number: true, text: (worker) => format.number(worker.budget), hint: "its share of the cap" },
        { title: "Waiting", number: true, text: (worker) => format.number(worker.waiting) },
      ],
      { key: (worker) => worker.index, empty: "No worker is known.", level: (worker) => (worker.silent ? "critical" : worker.isolated ? "warning" : null) },
    );
  }

  show(workers) {
    const rows = [...(workers ?? [])].sort((one, other) => String(one.node).localeCompare(String(other.node)) || one.index - other.index);
    this.table.update(rows);
    const nodes = new Set(rows.map((worker) => worker.node)).size;
    setText(byId("workers-summary"), rows.length ? `${format.count(rows.length, "worker")} on ${format.count(nodes, "node")}` : "");
  }
}

function workerState(worker) {
  const words = [worker.silent ? `silent for ${format.duration(worker.silent)}` : format.words(worker.state ?? "up")];
  if (worker.isolated) words.push("isolated: it alone cannot reach the database");
  return words.join(", ");
}

// --- replicas ---

const sentBy = (replica) =>
  replica.used_by === replica.workers ? "are sent there" : `are sent there by ${replica.used_by} of ${replica.workers} workers`;

export class Replicas {
  constructor() {
    this.table = new Table(
      byId("replicas-body"),
      "Replicas",
      [
        { title: "Replica", text: (replica) => replica.replica },
        { title: "Role", text: (replica) => format.words(replica.role) },
        { title: "Reads", text: (replica) => (replica.healthy ? sentBy(replica) : `go elsewhere${replica.problem ? `: ${replica.problem}` : ""}`) },
        { title: "Breaker", text: (replica) => format.words(replica.circuit_breaker), hint: "each worker has its own: the worst state" },
        { title: "Behind", number: true, text: (replica) => (replica.lag_seconds === null ? "–" : format.duration(replica.lag_seconds)) },
        { title: "In use", number: true, text: (replica) => format.number(replica.active) },
        { title: "Open", number: true, text: (replica) => format.number(replica.total) },
        { title: "May open", number: true, text: (replica) => format.number(replica.budget), hint: "its part of the cap" },
      ],
      { key: (replica) => replica.replica, empty: "", level: (replica) => (replica.healthy ? null : "warning") },
    );
  }

  show(replicas) {
    byId("replicas").hidden = !replicas?.length;
    this.table.update(replicas ?? []);
  }
}

// --- leases ---

export class Leases {
  constructor() {
    this.table = new Table(
      byId("leases-body"),
      "Connections held by callers",
      [
        { title: "Held by", text: (lease) => lease.held_by ?? "–" },
        { title: "For", number: true, text: (lease) => format.duration(lease.age) },
        { title: "Backend", number: true, text: (lease) => lease.backend_pid ?? "–", hint: "pid in pg_stat_activity" },
        { title: "Job", text: (lease) => lease.job ?? "–" },
        { title: "Node", text: (lease) => nodeName(lease.node), about: (lease) => lease.node },
        { title: "Process", number: true, text: (lease) => lease.process ?? "–" },
        { title: "Connection", class: "faint", text: (lease) => lease.connection },
      ],
      { key: (lease) => lease.connection, empty: "Nobody holds a connection by acquire() or transaction()." },
    );
  }

  show(leases) {
    const rows = [...(leases ?? [])].sort((one, other) => (other.age ?? 0) - (one.age ?? 0));
    this.table.update(rows);
    setText(byId("leases-summary"), rows.length ? `${format.number(rows.length)}, longest for ${format.duration(rows[0].age)}` : "");
  }
}
