// The figures over time that the charts show: seconds for the last two minutes, and coarser steps for what was before.

import { api } from "./live.js";

/** Seconds that the dashboard knows each second of. */
export const FINE = 120;

/** Series that say how it stands; all others add up, and are shown per second. */
const LEVELS = /^(active|idle|total|waiting|max_connections|.*_ms)$/;

/** Seconds after which coarse steps are fetched anew: none is complete before. */
const REFRESH = 10;

const EMPTY = { step: 1, start: 0, metrics: {} };

export class Series {
  constructor(onChange) {
    this.onChange = onChange;
    this.pool = null;
    this.seconds = FINE;
    this.fine = EMPTY;
    this.coarse = null;
    this.fetched = 0;
    this.request = 0;
    this.problem = null;
  }

  /** Show the last *seconds* of *pool*, from what the dashboard remembers. */
  async show(pool, seconds) {
    if (pool !== this.pool) {
      this.fine = EMPTY;
      this.coarse = null;
    } else if (seconds !== this.seconds) this.coarse = null;
    this.pool = pool;
    this.seconds = seconds;
    this.fetched = Date.now();
    const request = ++this.request;
    try {
      const wanted = seconds > FINE ? [FINE, seconds] : [FINE];
      const found = await Promise.all(wanted.map((length) => api(`/api/history?${new URLSearchParams({ pool, seconds: length })}`)));
      if (request !== this.request) return; // something else is wanted meanwhile
      this.fine = newer(this.fine, found[0]);
      this.coarse = found[1] ?? null;
      this.problem = null;
    } catch (error) {
      if (request !== this.request) return;
      this.problem = error.message;
    }
    this.onChange();
  }

  /** The newest complete second: {t, series: value …}. What came between is a gap. */
  append(point) {
    if (point?.t === undefined) return;
    const place = Math.round(point.t - this.fine.start);
    const length = this.length(this.fine);
    if (length === 0 || place < 0 || place > length + FINE) {
      const metrics = Object.fromEntries(seriesOf(point).map((name) => [name, [point[name] ?? null]]));
      this.fine = { step: 1, start: point.t, metrics };
      return;
    }
    for (const name of new Set([...Object.keys(this.fine.metrics), ...seriesOf(point)])) {
      const values = (this.fine.metrics[name] ??= []);
      while (values.length <= place) values.push(null);
      values[place] = point[name] ?? null;
    }
    const spare = this.length(this.fine) - FINE;
    if (spare > 0) {
      for (const values of Object.values(this.fine.metrics)) values.splice(0, spare);
      this.fine.start += spare;
    }
  }

  /** Whether it is time to look again for what is older than two minutes. */
  get isOld() {
    return this.seconds > FINE && Date.now() - this.fetched > REFRESH * 1000;
  }

  length({ metrics }) {
    return Math.max(0, ...Object.values(metrics).map((values) => values.length));
  }

  get names() {
    return Object.keys(this.fine.metrics);
  }

  /**
   * The times of all points, seconds since the epoch, and values(name), which are null where nobody has looked.
   * Coarse steps as far as they are complete, then seconds up to now.
   */
  points(until) {
    const steps = [];
    let from = this.fine.start;
    if (this.coarse !== null) {
      const { start, step } = this.coarse;
      const complete = Math.min(this.length(this.coarse), Math.floor((until - start) / step));
      for (let index = 0; index < complete; index += 1) steps.push([this.coarse, index]);
      from = Math.max(from, start + complete * step);
    }
    const oldest = until - this.seconds;
    const length = this.length(this.fine);
    for (let index = 0; index < length; index += 1) if (this.fine.start + index >= from) steps.push([this.fine, index]);
    const shown = steps.filter(([{ start, step }, index]) => start + (index + 1) * step >= oldest);
    return {
      times: shown.map(([{ start, step }, index]) => start + index * step),
      values: (name) =>
        shown.map(([{ metrics, step }, index]) => {
          const value = metrics[name]?.[index] ?? null;
          return value === null || LEVELS.test(name) ? value : value / step;
        }),
    };
  }
}

function seriesOf(point) {
  return Object.keys(point).filter((name) => name !== "t");
}

/** What was fetched, and of what has come in meanwhile the seconds after it. */
function newer(known, fetched) {
  const from = fetched.start + Math.max(0, ...Object.values(fetched.metrics).map((values) => values.length));
  const skip = Math.round(from - known.start);
  const metrics = {};
  for (const [name, values] of Object.entries(fetched.metrics)) metrics[name] = [...values];
  if (skip >= 0 && known.start > 0) {
    for (const [name, values] of Object.entries(known.metrics)) metrics[name]?.push(...values.slice(skip));
  }
  return { step: fetched.step, start: fetched.start, metrics };
}
