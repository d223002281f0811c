// The page: takes the frames of the dashboard, and shows those of the chosen pool.

import { Alerts } from "./alerts.js";
import { Breaker } from "./breaker.js";
import { Charts } from "./charts.js";
import { byId, choose, goTo, recall, remember, setText } from "./dom.js";
import * as format from "./format.js";
import { Live } from "./live.js";
import { showLights, showNoNews, showPools, showTiles, showVerdict } from "./overview.js";
import { FINE, Series } from "./series.js";
import { Errors, Leases, Statements, Waits, Workers } from "./tables.js";

const WINDOWS = [120, 1200, 3600];

const page = {
  state: null,
  at: 0,
  link: "connecting",
  since: 0,
  alerts: new Alerts(),
  breaker: new Breaker(),
  charts: new Charts(),
  errors: new Errors(),
  leases: new Leases(),
  series: new Series(() => drawCharts()),
  statements: new Statements(),
  waits: new Waits(),
  workers: new Workers(),
  seconds: WINDOWS.includes(Number(recall("window"))) ? Number(recall("window")) : 1200,
};

// --- frames ---

/** The pool that the address names; else the one that was looked at last; else the worst off. */
function chosen(pools) {
  const named = new URLSearchParams(location.hash.slice(1)).get("pool");
  if (named !== null && (named in pools || page.series.pool === named)) return named;
  const last = recall("pool");
  return last in pools ? last : Object.keys(pools)[0];
}

function showFrame() {
  const { pools = {}, alerts, names, links, version } = page.state;
  const name = chosen(pools);
  const pool = pools[name];
  showPools(pools, name);
  byId("main").hidden = pool === undefined;
  byId("empty").hidden = pool !== undefined;
  setText(byId("version"), version ?? "");
  showRayDashboard(links?.ray_dashboard);
  if (pool === undefined) {
    setText(byId("empty-title"), name === undefined ? "No pool runs in this Ray cluster" : `The pool “${name}” has ended`);
    document.title = "raypg";
    return;
  }
  showVerdict(name, pool);
  showLights(pool.lights);
  showTiles(pool);
  page.waits.show(pool.activity);
  page.statements.show(name, pool.statements, page.at);
  page.breaker.show(name, pool.breaker);
  page.errors.show(pool.errors);
  page.alerts.show(alerts, names, Object.keys(pools));
  page.workers.show(pool.workers);
  page.leases.show(pool.leases);
  if (page.series.pool !== name || page.series.isOld) page.series.show(name, page.seconds);
  page.series.append(pool.now);
  drawCharts();
}

function drawCharts() {
  const pool = page.state?.pools?.[page.series.pool];
  if (pool === undefined) return;
  byId("charts-note").hidden = page.series.problem === null;
  setText(byId("charts-note"), page.series.problem === null ? "" : `What was before is not shown: ${page.series.problem}`);
  page.charts.show(page.series, pool, page.at);
}

function showRayDashboard(address) {
  const link = byId("ray-dashboard");
  link.hidden = !/^https?:\/\//.test(address ?? "");
  if (!link.hidden && link.href !== address) link.href = address;
}

// --- the connection ---

function showLink(link, since, why) {
  const before = page.link;
  page.link = link;
  page.since = since;
  byId("link").dataset.state = link;
  document.body.dataset.link = link;
  if (link === "live") {
    setText(byId("link-text"), "Live");
    setText(byId("lost"), "");
    // What happened meanwhile is in the dashboard's history.
    if (before === "lost" && page.series.pool !== null) page.series.show(page.series.pool, page.seconds);
    return;
  }
  setText(byId("link-text"), "Not connected");
  setText(byId("lost"), lostWords(why));
  if (page.state !== null) showNoNews(since);
}

function lostWords(why) {
  if (why !== undefined) return `The dashboard refuses: ${why}`;
  const old = page.state === null ? "" : ` What you see is from ${format.moment(page.since / 1000)}.`;
  return `The connection to the dashboard is lost.${old} Trying again by itself.`;
}

// --- what people choose ---

function showTheme() {
  const { theme } = document.documentElement.dataset;
  const dark = theme === undefined ? matchMedia("(prefers-color-scheme: dark)").matches : theme === "dark";
  setText(byId("theme"), dark ? "Light" : "Dark");
  byId("theme").setAttribute("aria-label", dark ? "Use light colors" : "Use dark colors");
  return dark;
}

byId("theme").addEventListener("click", () => {
  const theme = showTheme() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  remember("theme", theme);
  showTheme();
  page.charts.draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  showTheme();
  page.charts.draw();
});

byId("windows").addEventListener("click", (event) => {
  if (event.target.dataset.seconds === undefined) return;
  page.seconds = Number(event.target.dataset.seconds);
  remember("window", page.seconds);
  choose(byId("windows"), "seconds", page.seconds);
  if (page.series.pool !== null) page.series.show(page.series.pool, page.seconds);
});

addEventListener("hashchange", () => {
  if (page.state === null) return;
  remember("pool", chosen(page.state.pools ?? {}));
  showFrame();
});

document.querySelector("[data-goto]").addEventListener("click", (event) => {
  event.preventDefault();
  goTo(event.currentTarget.dataset.goto);
});

document.addEventListener("visibilitychange", () => document.hidden || page.charts.draw());

showTheme();
choose(byId("windows"), "seconds", page.seconds);
new Live((state, at) => {
  const first = page.state === null;
  document.body.dataset.ready = "";
  page.state = state;
  page.at = at;
  showFrame();
  // After what matters has been painted.
  if (first) requestAnimationFrame(() => setTimeout(() => page.charts.load().catch((error) => setText(byId("charts-note"), error.message)), 0));
}, showLink);
