// The charts, drawn by plotly. Each has its newest figures beside the title, in words: they are its text alternative.

import { byId, el, setAttribute, setText } from "./dom.js";
import * as format from "./format.js";

/** A chart of quantiles in milliseconds. */
function times(prefix) {
  const colors = { p50: "--chart-2", p95: "--chart-1", p99: "--chart-4" };
  return {
    lines: Object.entries(colors).map(([name, color]) => ({ series: `${prefix}${name}_ms`, name, color })),
    format: format.ms,
    hover: "%{y:,.3~r} ms",
    logarithmic: true, // the slowest may take a thousand times as long as most
  };
}

const CHARTS = [
  {
    id: "connections",
    title: "Connections",
    lines: [
      { series: "active", name: "in use", color: "--chart-1", area: 0.55 },
      { series: "idle", name: "idle", color: "--chart-1-light", area: 0.55, above: "active" },
      { series: "waiting", name: "callers waiting", color: "--chart-3" },
    ],
    format: format.number,
    cap: true,
  },
  {
    id: "throughput",
    title: "Statements per second",
    lines: [{ series: "queries", name: "statements", color: "--chart-1", area: 0.16 }],
    format: format.short,
  },
  {
    id: "error-rate",
    title: "Error rate",
    lines: [{ of: ["errors", "calls"], name: "of calls failed", color: "--chart-5", area: 0.16 }],
    format: format.percent,
    axis: { tickformat: ".2~%" },
    hover: "%{y:.2~%}",
    least: 0.01,
  },
  { id: "execution", title: "Execution time", ...times("") },
  { id: "wait", title: "Wait for a connection", ...times("wait_") },
  {
    id: "errors-by-category",
    title: "Errors per second",
    prefix: "errors_",
    lines: [],
    format: format.short,
    none: "no errors",
    least: 1,
  },
  {
    id: "rows",
    title: "Rows per second",
    lines: [
      { series: "rows_fetched", name: "returned", color: "--chart-1" },
      { series: "rows", name: "written", color: "--chart-2", area: 0.16 },
    ],
    format: format.short,
  },
  {
    id: "cache",
    title: "Caches of routers, per second",
    lines: [
      { series: "cache_hits", name: "hits", color: "--chart-2" },
      { series: "cache_misses", name: "asked", color: "--chart-1" },
      { series: "cache_invalidations", name: "results ended by writes", color: "--chart-5" },
    ],
    format: format.short,
  },
];

const COLORS = ["--chart-5", "--chart-3", "--chart-4", "--chart-2", "--chart-1", "--chart-6"];
const STATES = { closed: "--ok", half_open: "--warning", open: "--critical" };
const HEIGHT = 176;

/** Width of a chart, about: lines that have moved by less need not be drawn anew. */
const PIXELS = 300;

/** Loaded when the rest of the page is there: it is large, and not needed to say what is wrong. */
function plotly() {
  plotly.loading ??= new Promise((resolve, reject) => {
    const script = el("script", { src: "/static/plotly.min.js" });
    script.addEventListener("load", () => resolve(window.Plotly));
    script.addEventListener("error", () => reject(new Error("The charts could not be loaded.")));
    document.head.append(script);
  });
  return plotly.loading;
}

/** Plotly shows numbers as times of UTC: this is the number that reads as this browser's time there. */
function local(seconds) {
  return seconds * 1000 - new Date(seconds * 1000).getTimezoneOffset() * 60_000;
}

/** Plotly reads tags in texts; this is what it shows as it stands. */
function plain(text) {
  return String(text ?? "").replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

export class Charts {
  constructor() {
    this.probe = el("span", { hidden: true });
    document.body.append(this.probe);
    this.visible = new Set();
    this.drawn = new Map(); // chart → of what and when its lines are
    this.last = new Map(); // chart → the turn in which it was drawn
    this.turn = 0;
    this.seen = new IntersectionObserver((entries) => this.look(entries), { rootMargin: "100px" });
    this.figures = new Map();
    for (const chart of CHARTS) this.add(chart.id, chart.title);
    this.add("breaker-states", "Breaker");
    this.latest = null;
    this.library = null;
  }

  async load() {
    this.library = await plotly();
    this.draw();
  }

  add(id, title) {
    const plot = el("div", { class: "plot", id: `plot-${id}`, role: "img" });
    const legend = el("ul", { class: "legend" });
    const heading = el("h3", { id: `title-${id}` }, title);
    const figure = el("figure", { class: `chart chart-${id}`, "aria-labelledby": `title-${id}`, "data-chart": id }, el("figcaption", {}, heading, legend), plot);
    byId("grid").append(figure);
    this.figures.set(id, { plot, legend, title, named: "" });
    this.seen.observe(figure);
  }

  look(entries) {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) this.visible.add(target.dataset.chart);
      else this.visible.delete(target.dataset.chart);
    }
    if (this.latest !== null) this.work();
  }

  /** Show these figures. The words are those of now; lines are drawn anew when they have moved by a pixel. */
  show(series, pool, until) {
    this.latest = { series, pool, until };
    this.drawn.forEach((then, id) => {
      if (then.pool !== series.pool || then.seconds !== series.seconds || until - then.until >= series.seconds / PIXELS) this.drawn.delete(id);
    });
    this.work();
  }

  /** Draw all anew: colors have changed, or what was long ago has come. */
  draw() {
    this.drawn.clear();
    if (this.latest !== null) this.work();
  }

  work() {
    const { series, pool, until } = this.latest;
    const points = series.points(until);
    const spans = breakerSpans(pool.breaker, until);
    const shared = { x: points.times.map(local), range: [local(until - series.seconds), local(until)], pool, spans };
    const drawings = [];
    for (const chart of CHARTS) {
      const lines = (chart.prefix ? categories(chart, series) : chart.lines).map((line) => ({
        ...line,
        y: valuesOf(line, points),
        base: line.above ? points.values(line.above) : null,
      }));
      const shown = chart.prefix ? lines.filter((line) => most(line.y) > 0).sort((one, other) => total(other.y) - total(one.y)) : lines;
      this.legend(chart, shown, pool);
      drawings.push([chart.id, () => this.plot(chart, shown, shared)]);
    }
    this.breakerLegend(spans, pool.breaker);
    drawings.push(["breaker-states", () => this.breaker(shared)]);
    if (this.library === null || document.hidden) return;
    const due = drawings.filter(([id]) => this.visible.has(id) && !this.drawn.has(id));
    due.forEach(([id]) => this.drawn.set(id, { pool: series.pool, seconds: series.seconds, until }));
    // Those first whose turn has not come for longest: on a slow machine it may not come for all each time.
    due.sort(([one], [other]) => (this.last.get(one) ?? 0) - (this.last.get(other) ?? 0));
    this.next(due, ++this.turn);
  }

  /** One drawing per frame of the screen, so that the page answers in between. */
  next(drawings, turn) {
    if (drawings.length === 0) return;
    if (turn !== this.turn) {
      drawings.forEach(([id]) => this.drawn.delete(id)); // by figures that are newer
      return;
    }
    const [[id, draw], ...later] = drawings;
    this.last.set(id, turn);
    draw();
    requestAnimationFrame(() => this.next(later, turn));
  }

  legend(chart, lines, pool) {
    const { legend, plot } = this.figures.get(chart.id);
    const items = lines.map((line) => ({ name: line.name, color: line.color, value: chart.format(newest(line.y)), most: chart.format(most(line.y)) }));
    if (chart.cap) items.push({ name: "cap", color: "--muted", value: format.number(pool.max_connections), dashed: true });
    if (items.length === 0) items.push({ name: chart.none ?? "nothing yet", value: "" });
    items.forEach((item, index) => {
      const entry = legend.children[index] ?? legend.appendChild(el("li", {}, el("i", { "aria-hidden": "true" }), el("span"), el("b")));
      const [mark, name, value] = entry.children;
      const color = item.color ? `var(${item.color})` : "transparent";
      if (mark.style.background !== color) mark.style.background = color;
      setText(name, item.name);
      setText(value, item.value);
    });
    while (legend.children.length > items.length) legend.lastElementChild.remove();
    const told = items.map((item) => `${item.name} ${item.value} now${item.most ? `, at most ${item.most}` : ""}`).join("; ");
    setAttribute(plot, "aria-label", `Chart of ${chart.title.toLowerCase()}: ${told}`);
  }

  plot(chart, lines, { x, range, pool, spans }) {
    const stacked = Boolean(chart.prefix);
    const behind = [...lines].sort((one, other) => Number(Boolean(other.base)) - Number(Boolean(one.base)));
    const traces = behind.map((line, index) => ({
      x,
      y: line.base ? line.y.map((value, at) => (value === null || line.base[at] === null ? null : value + line.base[at])) : line.y,
      customdata: line.y,
      name: line.name,
      type: "scatter",
      mode: "lines",
      line: { color: this.color(line.color), width: stacked || line.area > 0.5 ? 0.8 : 1.6, shape: stacked ? "hv" : "linear" },
      fill: stacked ? (index === 0 ? "tozeroy" : "tonexty") : line.area ? "tozeroy" : "none",
      fillcolor: this.color(line.color, line.area ?? 0.55),
      ...(stacked ? { stackgroup: "all", stackgaps: "infer zero" } : {}),
      hovertemplate: `${plain(line.name)} ${(chart.hover ?? "%{y:,.3~r}").replace("y:", "customdata:")}<extra></extra>`,
    }));
    const shapes = spans.filter((span) => span.state !== "closed").map((span) => this.band(span, range));
    let top = Math.max(chart.least ?? 0, ...lines.map((line) => most(line.y) ?? 0));
    if (chart.cap && pool.max_connections) {
      const y = pool.max_connections;
      top = Math.max(top, y * 1.08);
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: this.color("--muted"), width: 1, dash: "dot" } });
    }
    // Nothing is drawn above: an empty chart has the same axes.
    const yaxis = { rangemode: "tozero", ...(stacked || chart.cap ? {} : { range: [0, top * 1.08 || 1] }), ...chart.axis };
    if (stacked && lines.length === 0) yaxis.range = [0, 1];
    if (chart.cap) yaxis.range = [0, top];
    if (chart.logarithmic) Object.assign(yaxis, powers(lines.flatMap((line) => line.y)));
    this.react(chart.id, traces, range, { yaxis, shapes }, HEIGHT);
  }

  breakerLegend(spans, breaker) {
    const { legend, plot } = this.figures.get("breaker-states");
    const state = breaker?.state ?? "unknown";
    const entry = legend.firstElementChild ?? legend.appendChild(el("li", {}, el("i", { "aria-hidden": "true" }), el("span"), el("b")));
    entry.children[0].style.background = `var(${STATES[state] ?? "--muted"})`;
    setText(entry.children[1], breaker?.forced ? "forced" : "now");
    setText(entry.children[2], format.words(state));
    const told = spans.map((span) => `${format.words(span.state)} from ${format.moment(span.from)}${span.reason ? ` (${span.reason})` : ""}`);
    setAttribute(plot, "aria-label", `Timeline of the breaker: ${told.slice(-5).join("; ") || format.words(state)}`);
  }

  breaker({ spans, range }) {
    const shown = spans.filter((span) => local(span.to) > range[0]);
    const trace = {
      type: "bar",
      orientation: "h",
      y: shown.map(() => "state"),
      base: shown.map((span) => Math.max(local(span.from), range[0])),
      x: shown.map((span) => local(span.to) - Math.max(local(span.from), range[0])),
      marker: { color: shown.map((span) => this.color(STATES[span.state] ?? "--muted", span.state === "closed" ? 0.45 : 0.9)) },
      text: shown.map((span) => format.words(span.state)),
      textposition: "inside",
      insidetextfont: { color: shown.map((span) => this.color(span.state === "closed" ? "--text" : "--on-badge")) },
      insidetextanchor: "middle",
      customdata: shown.map((span) => plain(`${format.words(span.state)} since ${format.moment(span.from)}${span.reason ? `: ${span.reason}` : ""}`)),
      hovertemplate: "%{customdata}<extra></extra>",
    };
    this.react("breaker-states", [trace], range, { yaxis: { visible: false }, bargap: 0.55, hovermode: "closest" }, HEIGHT);
  }

  band(span, range) {
    return {
      type: "rect",
      layer: "below",
      yref: "paper",
      y0: 0,
      y1: 1,
      x0: Math.max(local(span.from), range[0]),
      x1: local(span.to),
      fillcolor: this.color(STATES[span.state] ?? "--muted", 0.13),
      line: { width: 0 },
    };
  }

  react(id, traces, range, { yaxis, ...more }, height) {
    const axis = { gridcolor: this.color("--line"), zerolinecolor: this.color("--line"), linecolor: this.color("--line"), fixedrange: true, automargin: true };
    const layout = {
      height,
      margin: { l: 44, r: 8, t: 6, b: 24 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 11, color: this.color("--muted") },
      showlegend: false,
      hovermode: "x unified",
      hoverlabel: { bgcolor: this.color("--surface"), bordercolor: this.color("--line"), font: { color: this.color("--text") } },
      dragmode: false,
      xaxis: { ...axis, automargin: false, type: "date", range, tickformat: range[1] - range[0] > 180_000 ? "%H:%M" : "%H:%M:%S", hoverformat: "%H:%M:%S", nticks: 5, showgrid: false },
      yaxis: { ...axis, automargin: false, nticks: 5, ...yaxis },
      ...more,
    };
    this.library.react(this.figures.get(id).plot, traces, layout, { displayModeBar: false, responsive: true });
  }

  /** The color that a variable of the style sheet has now. */
  color(variable, opacity = 1) {
    this.probe.style.color = `var(${variable})`;
    const [red, green, blue] = getComputedStyle(this.probe).color.match(/[\d.]+/g);
    return `rgba(${red},${green},${blue},${opacity})`;
  }
}

/** An axis of powers of ten around *values*, in milliseconds. */
function powers(values) {
  const known = values.filter((value) => value > 0);
  const first = known.length ? Math.floor(Math.log10(Math.min(...known))) : 0;
  const last = known.length ? Math.max(first + 1, Math.ceil(Math.log10(Math.max(...known)))) : 2;
  const tickvals = [];
  const step = Math.ceil((last - first) / 5);
  for (let power = first; power <= last; power += step) tickvals.push(10 ** power);
  return { type: "log", rangemode: "normal", range: [first, last], tickvals, ticktext: tickvals.map(format.ms) };
}

function categories(chart, series) {
  return series.names
    .filter((name) => name.startsWith(chart.prefix))
    .map((name, index) => ({ series: name, name: format.words(name.slice(chart.prefix.length)), color: COLORS[index % COLORS.length] }));
}

function valuesOf(line, points) {
  if (line.of === undefined) return points.values(line.series);
  const [part, whole] = line.of.map((name) => points.values(name));
  return part.map((value, index) => (value === null || whole[index] === null ? null : whole[index] ? value / whole[index] : 0));
}

function newest(values) {
  for (let index = values.length - 1; index >= Math.max(0, values.length - 3); index -= 1) if (values[index] !== null) return values[index];
  return null;
}

const total = (values) => values.reduce((sum, value) => sum + (value ?? 0), 0);

function most(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? Math.max(...known) : null;
}

/** What the breaker was, from when to when, and why. */
export function breakerSpans(breaker, until) {
  const changes = (breaker?.transitions ?? [])
    .map((change) => ({ ...change, at: (format.toDate(change.timestamp)?.getTime() ?? 0) / 1000 }))
    .sort((one, other) => one.at - other.at);
  if (changes.length === 0) return breaker?.state ? [{ state: breaker.state, from: until - 86_400, to: until, reason: breaker.reason }] : [];
  const spans = [{ state: changes[0].from, from: changes[0].at - 86_400, to: changes[0].at, reason: null }];
  changes.forEach((change, index) => {
    spans.push({ state: change.to, from: change.at, to: changes[index + 1]?.at ?? Math.max(until, change.at), reason: change.reason });
  });
  return spans;
}
