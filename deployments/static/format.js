// How figures are written. Everything takes null for "not known" and writes it as a dash.

const NONE = "–";

/** Formatters are slow to make, and used for every figure of every second. */
const formatters = new Map();

function rounded(value, digits) {
  if (!formatters.has(digits)) formatters.set(digits, new Intl.NumberFormat("en", digits ? { maximumSignificantDigits: digits } : { maximumFractionDigits: 0 }));
  return formatters.get(digits).format(value);
}

/** A number with at most *digits* significant ones, and groups of thousands: 1,234, 12.3, 0.0071. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  return rounded(value, size >= 10 ** digits || Number.isInteger(value) ? 0 : digits);
}

/** Large numbers short: 1.2k, 34M. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  for (const [limit, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return `${rounded(value / (unit === "k" ? 1e3 : limit), 3)}${unit}`;
  }
  return number(value);
}

/** Milliseconds in the unit that reads best. */
export function ms(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value >= 60_000) return duration(value / 1000);
  if (value >= 1000) return `${number(value / 1000)} s`;
  return value > 0 && value < 0.995 ? `${number(value, 2)} ms` : `${number(value)} ms`;
}

export function percent(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value === 0) return "0 %";
  if (value < 0.0001) return "< 0.01 %";
  return `${rounded(value * 100, value < 0.1 ? 2 : 3)} %`;
}

/** Seconds as 0.4 s, 12 s, 3 min 4 s, 2 h 5 min. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return NONE;
  if (seconds < 10) return `${rounded(Math.round(seconds * 10) / 10, 2)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  if (whole < 86_400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86_400)} d ${Math.floor((whole % 86_400) / 3600)} h`;
}

/** Seconds since the epoch, or what Date can read, as a moment of this browser; with the day if that is not today. */
export function moment(at) {
  const date = toDate(at);
  if (date === null) return NONE;
  const time = date.toLocaleTimeString("en-GB");
  const today = new Date().toDateString() === date.toDateString();
  return today ? time : `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

/** A moment as Date; null if there is none. */
export function toDate(at) {
  if (at === null || at === undefined) return null;
  const date = new Date(typeof at === "number" ? at * 1000 : at);
  return Number.isNaN(date.getTime()) ? null : date;
}

/** 1 caller, 2 callers. */
export function count(value, one, many = `${one}s`) {
  return `${number(value)} ${value === 1 ? one : many}`;
}

/** query_timeout → query timeout. */
export function words(name) {
  return String(name).replaceAll("_", " ");
}
