// What is wrong now: the pools, the verdict, the lights, and the figures of this moment.

import { byId, el, goTo, keyed, setAttribute, setText } from "./dom.js";
import * as format from "./format.js";

export const LEVELS = {
  ok: { word: "OK", sign: "✓" },
  unknown: { word: "Unknown", sign: "?" },
  warning: { word: "Warning", sign: "!" },
  critical: { word: "Critical", sign: "✕" },
};

/** Where the page says more about a light. */
const MORE = { pool: "workers", database: "waits", breaker: "breaker", alerts: "alerts", replicas: "replicas" };

const level = (name) => LEVELS[name] ?? LEVELS.unknown;

// --- pools ---

export function showPools(pools, selected) {
  const parent = byId("pools");
  parent.hidden = Object.keys(pools).length === 0;
  keyed(
    parent,
    Object.entries(pools),
    ([name]) => name,
    ([name]) =>
      el(
        "a",
        { href: `#${new URLSearchParams({ pool: name })}` },
        el("span", { class: "badge", "aria-hidden": "true" }),
        el("span", { class: "pool-name" }, name),
        el("span", { class: "unseen" }),
        el("span", { class: "pool-figures" }),
      ),
    (link, [name, pool]) => {
      const here = pool.verdict?.level ?? "unknown";
      setAttribute(link, "data-level", here);
      setAttribute(link, "aria-current", name === selected ? "page" : null);
      setAttribute(link, "title", pool.verdict?.text);
      setText(link.children[0], level(here).sign);
      setText(link.children[2], `, ${level(here).word},`);
      setText(link.children[3], `${pool.active ?? 0}/${pool.max_connections ?? "?"} · ${format.short(pool.queries_per_second)}/s`);
    },
  );
}

// --- verdict and lights ---

let announced = "";

/** For screen readers: only when something else is wrong, not each time a number in the sentence changes. */
function announce(text) {
  const gist = text.replace(/[\d.,]+/g, "#");
  if (gist === announced) return;
  announced = gist;
  setText(byId("announce"), text);
}

export function showVerdict(name, pool) {
  const verdict = pool.verdict ?? { level: "unknown", text: "Nothing is known yet." };
  showSentence(verdict.level, verdict.text);
  setText(byId("pool-name"), name);
  setText(byId("pool-database"), pool.database ?? "");
  announce(`${name}: ${level(verdict.level).word}. ${verdict.text}`);
  document.title = `${level(verdict.level).sign} ${name} – raypg`;
}

function showSentence(name, text) {
  const verdict = byId("verdict");
  setAttribute(verdict, "data-level", name);
  setText(verdict.querySelector(".badge"), level(name).sign);
  setText(byId("verdict-level"), level(name).word);
  setText(byId("verdict-text"), text);
}

/** What was shown last is old now, and says nothing about what is. */
export function showNoNews(since) {
  showSentence("unknown", `No news since ${format.moment(since / 1000)}: the page has lost its connection to the dashboard.`);
  document.title = "? no connection – raypg";
}

export function showLights(lights) {
  keyed(
    byId("lights"),
    Object.entries(lights ?? {}),
    ([name]) => name,
    ([name]) =>
      el(
        "li",
        {},
        el(
          "button",
          { type: "button", onclick: () => goTo(MORE[name] ?? "now"), "data-light": name },
          el("span", { class: "badge", "aria-hidden": "true" }),
          el("span", { class: "light-name" }, format.words(name)),
          el("span", { class: "light-level" }),
          el("span", { class: "light-text" }),
        ),
      ),
    (item, [, light]) => {
      const [button] = item.children;
      setAttribute(button, "data-level", light.level);
      setText(button.children[0], level(light.level).sign);
      setText(button.children[2], level(light.level).word);
      setText(button.children[3], light.text);
      setAttribute(button.children[3], "title", light.text);
    },
  );
}

// --- figures of now ---

const TILES = [
  {
    title: "Health",
    hint: "mean score of the open connections, of 100",
    value: (pool) => (pool.health_score === null || pool.health_score === undefined ? "–" : String(Math.round(pool.health_score))),
    sub: () => "of 100",
    level: (pool) => ((pool.health_score ?? 100) < 50 ? "critical" : (pool.health_score ?? 100) < 70 ? "warning" : null),
  },
  {
    title: "In use",
    hint: "connections in use, and how many there may be in the whole cluster",
    value: (pool) => `${format.number(pool.active)} / ${format.number(pool.max_connections)}`,
    sub: (pool) => `${format.number(pool.idle)} idle${pool.opening ? `, ${pool.opening} opening` : ""}`,
    level: (pool) => (pool.max_connections && pool.active >= pool.max_connections ? "warning" : null),
    share: (pool) => [pool.active, pool.idle, pool.max_connections],
  },
  {
    title: "Waiting",
    hint: "callers that wait for a connection",
    value: (pool) => format.number(pool.waiting),
    sub: (pool) => (pool.waiting ? "for a connection" : "nobody waits"),
    level: (pool) => (pool.waiting ? "warning" : null),
  },
  {
    title: "Statements",
    hint: "per second, over the last 10 s",
    value: (pool) => format.short(pool.queries_per_second),
    sub: () => "per second",
  },
  {
    title: "Failed",
    hint: "share of the calls of the last minute that failed",
    value: (pool) => format.percent(pool.error_rate),
    sub: () => "of calls, last minute",
    level: (pool) => (pool.error_rate > 0.05 ? "critical" : pool.error_rate > 0.01 ? "warning" : null),
  },
  {
    title: "Execution p95",
    hint: "time that statements took on the server, last minute",
    value: (pool) => format.ms(pool.execution_ms?.p95),
    sub: (pool) => `p50 ${format.ms(pool.execution_ms?.p50)}\np99 ${format.ms(pool.execution_ms?.p99)}`,
  },
  {
    title: "Wait p95",
    hint: "time that callers waited for a connection, last minute",
    value: (pool) => format.ms(pool.wait_ms?.p95),
    sub: (pool) => `p50 ${format.ms(pool.wait_ms?.p50)}\np99 ${format.ms(pool.wait_ms?.p99)}`,
  },
  {
    title: "Rows written",
    hint: "rows that statements have inserted, updated, deleted or copied",
    value: (pool) => format.short(pool.rows_per_second),
    sub: () => "per second",
  },
  {
    title: "Cache hits",
    hint: "share of the reads of the last minute that routers might have had in their cache, and had",
    shown: (pool) => Boolean(pool.cache),
    value: (pool) => format.percent(pool.cache.hit_rate),
    sub: (pool) => `${format.short(pool.cache.entries)} results kept\n${format.short(pool.cache.invalidations)} ended by writes`,
  },
];

export function showTiles(pool) {
  keyed(
    byId("tiles"),
    TILES.filter((tile) => tile.shown?.(pool) ?? true),
    (tile) => tile.title,
    (tile) =>
      el(
        "div",
        { class: "tile", title: tile.hint },
        el("dt", {}, tile.title),
        el("dd", { class: "value" }),
        el("dd", { class: "sub" }),
        tile.share ? el("dd", { class: "share", "aria-hidden": "true" }, el("span"), el("span")) : null,
      ),
    (element, tile) => {
      setAttribute(element, "data-level", tile.level?.(pool));
      setText(element.children[1], tile.value(pool));
      setText(element.children[2], tile.sub(pool));
      if (!tile.share) return;
      const [active, idle, most] = tile.share(pool);
      const [used, free] = element.children[3].children;
      used.style.width = `${most ? (100 * active) / most : 0}%`;
      free.style.width = `${most ? (100 * idle) / most : 0}%`;
    },
  );
}
