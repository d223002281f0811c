// Alert rules with their state, their history, and the form that adds one.

import { byId, el, keyed, setText, Table } from "./dom.js";
import { submit, told } from "./breaker.js";
import * as format from "./format.js";
import { api } from "./live.js";

const LEVELS = { critical: "critical", error: "critical", warning: "warning", info: "unknown" };
const SHOWN = 50;

export class Alerts {
  constructor() {
    this.form = byId("alert-form");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.add();
    });
    this.removed = new Set();
    this.latest = null;
    this.rules = new Table(
      byId("rules-body"),
      "Alert rules",
      [
        { title: "Rule", fill: fillRule },
        { title: "Condition", class: "sql", fill: fillCondition },
        { title: "Severity", text: (rule) => rule.severity },
        { title: "Pool", text: (rule) => rule.pool ?? "all" },
        { title: "State", class: "state", fill: fillState },
        { title: "Action", class: "tight", fill: (cell, rule) => this.fillDelete(cell, rule) },
      ],
      { key: (rule) => rule.id, empty: "There is no rule.", level: (rule) => worst(rule.alerts) },
    );
    this.history = new Table(
      byId("alert-history"),
      "Alerts that fired",
      [
        { title: "Fired", class: "when", text: (alert) => format.moment(alert.fired_at ?? alert.since) },
        { title: "Alert", text: (alert) => alert.name },
        { title: "Pool", text: (alert) => alert.pool ?? "–" },
        { title: "Severity", text: (alert) => alert.severity },
        { title: "Ended", class: "when", text: ended },
        { title: "What was the matter", text: (alert) => alert.message ?? "" },
      ],
      { key: (alert) => alert.key, empty: "No alert has fired yet.", level: (alert) => (alert.state === "firing" ? LEVELS[alert.severity] : null) },
    );
  }

  show(alerts, names, pools) {
    this.latest = [alerts, names, pools];
    const active = alerts?.active ?? [];
    const rules = (alerts?.rules ?? []).filter((rule) => !this.removed.has(rule.id));
    const withAlerts = rules.map((rule) => ({ ...rule, alerts: active.filter((alert) => alert.rule_id === rule.id) }));
    this.rules.update(withAlerts.sort((one, other) => rank(other) - rank(one)));
    const firing = active.filter((alert) => alert.state === "firing");
    const known = [...firing, ...(alerts?.history ?? []).filter((alert) => !firing.some((other) => identity(other) === identity(alert)))];
    this.history.update(unique(known).slice(0, SHOWN));
    setText(byId("alerts-summary"), `${format.count(rules.length, "rule")}, ${firing.length ? `${format.number(firing.length)} firing` : "none fires"}`);
    this.showNames(names ?? {});
    this.showPools(pools);
  }

  showNames(names) {
    const entries = Object.entries(names);
    keyed(byId("figure-names"), entries, ([name]) => name, ([name, about]) => el("option", { value: name }, about), () => {});
    keyed(
      byId("figures"),
      entries,
      ([name]) => name,
      ([name, about]) => el("div", {}, el("dt", {}, el("code", {}, name)), el("dd", {}, about)),
      () => {},
    );
  }

  showPools(pools) {
    const items = ["", ...pools];
    keyed(byId("alert-pool"), items, (name) => name, (name) => el("option", { value: name }, name || "all pools"), () => {});
  }

  async add() {
    const fields = this.form.elements;
    const body = {
      name: fields.name.value.trim(),
      condition: fields.condition.value.trim(),
      duration_seconds: Number(fields.duration_seconds.value),
      cooldown_seconds: Number(fields.cooldown_seconds.value),
      severity: fields.severity.value,
    };
    const threshold = fields.threshold.value.trim();
    if (threshold !== "") body.threshold = Number.isNaN(Number(threshold)) ? threshold : Number(threshold);
    if (fields.pool.value) body.pool = fields.pool.value;
    if (fields.webhook_url.value) body.webhook_url = fields.webhook_url.value;
    if (!(await submit(this.form, "/api/alerts", body, briefly))) return;
    told(this.form, `Added: ${body.name}.`);
    for (const name of ["name", "condition", "threshold", "webhook_url"]) fields[name].value = "";
    fields.name.focus();
  }

  fillDelete(cell, rule) {
    if (cell.children.length === 0) {
      const button = el("button", { type: "button", class: "quiet", "aria-label": `Delete the rule ${rule.name}` }, "Delete");
      button.addEventListener("click", () => this.remove(rule.id, button));
      cell.append(button);
    }
  }

  /** Asks once more in place: a rule that is gone is missed only when it would have fired. */
  async remove(id, button) {
    if (button.dataset.sure === undefined) {
      button.dataset.sure = "";
      button.textContent = "Sure?";
      button.addEventListener("blur", () => {
        delete button.dataset.sure;
        button.textContent = "Delete";
      }, { once: true });
      return;
    }
    try {
      await api(`/api/alerts/${encodeURIComponent(id)}`, { method: "DELETE" });
      this.removed.add(id); // until the next frame says so too
      if (this.latest) this.show(...this.latest);
      byId("alerts").focus();
    } catch (error) {
      told(this.form, error.message);
    }
  }
}

/** Without the list of all figures, which is on the page. */
function briefly(message) {
  const short = message.replace(/ \(there are [^)]{200,}\)$/, "; see the list of figures below");
  if (short !== message) byId("alert-figures").open = true;
  return short;
}

function rank(rule) {
  return rule.alerts.some((alert) => alert.state === "firing") ? 2 : rule.alerts.length ? 1 : 0;
}

function worst(alerts) {
  const firing = alerts.filter((alert) => alert.state === "firing");
  if (firing.length === 0) return alerts.length ? "pending" : null;
  return firing.some((alert) => LEVELS[alert.severity] === "critical") ? "critical" : "warning";
}

function fillRule(cell, rule) {
  if (cell.children.length === 0) cell.append(el("span"), el("small"));
  setText(cell.children[0], rule.name);
  const parts = [rule.default ? "default" : null, rule.webhook_url ? "log and webhook" : null];
  setText(cell.children[1], parts.filter(Boolean).join(" · "));
}

function fillCondition(cell, rule) {
  if (cell.children.length === 0) cell.append(el("code"), el("small"));
  const threshold = rule.threshold !== null && rule.threshold !== undefined && !/[<>=!]/.test(rule.condition) ? ` > ${rule.threshold}` : "";
  setText(cell.children[0], `${rule.condition}${threshold}`);
  const parts = [rule.duration_seconds ? `for ${format.duration(rule.duration_seconds)}` : "at once"];
  if (rule.cooldown_seconds) parts.push(`cooldown ${format.duration(rule.cooldown_seconds)}`);
  setText(cell.children[1], parts.join(", "));
}

function fillState(cell, rule) {
  const words = rule.alerts.map((alert) => `${alert.state} on ${alert.pool} since ${format.moment(alert.fired_at ?? alert.since)}`);
  setText(cell, words.join("; ") || "quiet");
}

function ended(alert) {
  if (alert.state === "firing") return "firing";
  const seconds = alert.resolved_at && alert.fired_at ? ` (${format.duration(alert.resolved_at - alert.fired_at)})` : "";
  return `${format.moment(alert.resolved_at)}${seconds}`;
}

const identity = (alert) => `${alert.rule_id} ${alert.pool} ${alert.fired_at}`;

function unique(alerts) {
  const times = new Map();
  return alerts.map((alert) => {
    const name = identity(alert);
    times.set(name, (times.get(name) ?? 0) + 1);
    return { ...alert, key: `${name} ${times.get(name)}` };
  });
}
