// The circuit breaker: what it did and why, and the form that forces it open or closed.

import { byId, el, keyed, recall, remember, setAttribute, setText } from "./dom.js";
import * as format from "./format.js";
import { api } from "./live.js";

const LEVELS = { closed: "ok", half_open: "warning", open: "critical" };
const SHOWN = 8;

export class Breaker {
  constructor() {
    this.form = byId("breaker-form");
    this.pool = null;
    this.form.elements.by.value = recall("by") ?? "";
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send(event.submitter?.value ?? "force_close");
    });
  }

  show(name, breaker) {
    this.pool = name;
    const state = breaker?.state ?? "unknown";
    const words = [breaker?.forced ? `forced ${format.words(state)}` : format.words(state)];
    if (breaker?.forced_reason) words.push(breaker.forced_reason);
    else if (state !== "closed" && breaker?.reason) words.push(breaker.reason);
    if (breaker?.time_until_recovery > 0) words.push(`tries again in ${format.duration(breaker.time_until_recovery)}`);
    setText(byId("breaker-state"), words.join(": "));
    setAttribute(byId("breaker-state"), "data-level", LEVELS[state] ?? "unknown");
    setText(this.form.querySelector("[value=force_close]"), breaker?.forced ? "Release: force closed" : "Force closed");
    const changes = [...(breaker?.transitions ?? [])].reverse().slice(0, SHOWN);
    const isolated = Object.entries(breaker?.workers ?? {}).filter(([, worker]) => worker?.isolated);
    const rows = [
      ...isolated.map(([index]) => ({ key: `worker ${index}`, level: "warning", title: `worker ${index} isolated itself`, reason: "it alone cannot reach the database", at: null })),
      ...changes.map((change) => ({
        key: `${change.timestamp} ${change.from} ${change.to}`,
        level: LEVELS[change.to],
        title: `${format.words(change.from)} → ${format.words(change.to)}`,
        reason: change.reason,
        at: change.timestamp,
      })),
    ];
    if (rows.length === 0) rows.push({ key: "none", level: LEVELS[state], title: "It has never changed its state.", reason: "", at: null });
    keyed(
      byId("breaker-history"),
      rows,
      (row) => row.key,
      () => el("li", {}, el("time"), el("b"), el("span")),
      (item, row) => {
        setAttribute(item, "data-level", row.level);
        setText(item.children[0], row.at === null ? "" : format.moment(row.at));
        setText(item.children[1], row.title);
        setText(item.children[2], row.reason ?? "");
      },
    );
  }

  async send(action) {
    const { by, reason, ttl } = this.form.elements;
    if (action === "force_open" && !(await confirmed(this.pool, reason.value))) return;
    remember("by", by.value);
    const body = { action, reason: reason.value, by: by.value, ttl: ttl.value === "" ? null : Number(ttl.value) };
    if (action === "force_close") body.ttl = null;
    const done = await submit(this.form, `/api/pools/${encodeURIComponent(this.pool)}/breaker`, body);
    if (done) told(this.form, action === "force_open" ? "Forced open." : "Closed.");
  }
}

/** Whether the person means it: nothing reaches the database any more. */
function confirmed(pool, reason) {
  const dialog = byId("confirm");
  setText(byId("confirm-text"), `All calls to the pool “${pool}” fail at once, in every job, until somebody closes it. Reason: ${reason}`);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

/** Post a form's body; what is refused is said at the form, as *say* words it. True if it was taken. */
export async function submit(form, path, body, say = (message) => message) {
  const problem = form.querySelector(".error");
  const buttons = [...form.querySelectorAll("button")];
  problem.hidden = true;
  told(form, "");
  for (const button of buttons) button.disabled = true;
  try {
    await api(path, { method: "POST", body });
    return true;
  } catch (error) {
    setText(problem, say(error.message));
    problem.hidden = false;
    return false;
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

export function told(form, text) {
  setText(form.querySelector(".done"), text);
}
