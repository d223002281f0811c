// The frames of the dashboard: one state, then a patch each second. Reconnects by itself, and says so.

/** No word for so long, in milliseconds, and the connection counts as lost, though nobody has closed it. */
const SILENCE = 4000;
const LOOK_EVERY = 500;
const FIRST_DELAY = 300;
const LONGEST_DELAY = 5000;

/** JSON merge patch, RFC 7386: members of *patch* replace those of *target*, null takes one away. */
export function mergePatch(target, patch) {
  if (!isObject(patch)) return patch;
  const result = isObject(target) ? { ...target } : {};
  for (const [name, value] of Object.entries(patch)) {
    if (value === null) delete result[name];
    else result[name] = mergePatch(result[name], value);
  }
  return result;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/**
 * Calls onFrame(state, at) for each frame, and onLink("live" | "lost", since, why) as often as that is seen.
 * `at` is the dashboard's clock, seconds since the epoch; `since` this browser's, in milliseconds; `why` the dashboard's
 * own words, if it has refused.
 */
export class Live {
  constructor(onFrame, onLink) {
    this.onFrame = onFrame;
    this.onLink = onLink;
    this.state = null;
    this.seq = -1;
    this.heard = Date.now();
    this.delay = FIRST_DELAY;
    this.socket = null;
    this.open();
    this.looked = Date.now();
    this.awake = 0;
    setInterval(() => this.look(), LOOK_EVERY);
    addEventListener("online", () => this.now());
    document.addEventListener("visibilitychange", () => document.hidden || this.now());
  }

  open() {
    this.timer = null;
    this.opened = Date.now();
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/ws`);
    this.socket = socket;
    this.taken = false;
    socket.addEventListener("message", (event) => this.socket === socket && this.take(JSON.parse(event.data)));
    socket.addEventListener("close", () => this.socket === socket && this.lose());
  }

  take(message) {
    if (message.type === "state") this.state = message.state;
    else if (message.seq === this.seq + 1) this.state = mergePatch(this.state, message.patch);
    else return this.lose(); // one is missing: only a new state helps
    this.seq = message.seq;
    this.heard = Date.now();
    this.taken = true;
    this.delay = FIRST_DELAY;
    this.onLink("live", this.heard);
    return this.onFrame(this.state, message.at);
  }

  look() {
    // A browser that was busy or asleep itself has heard nothing either: what came meanwhile is still to be read.
    const late = Date.now() - this.looked > 2 * LOOK_EVERY;
    this.looked = Date.now();
    if (late) this.awake = this.looked;
    if (this.socket !== null && Date.now() - Math.max(this.heard, this.opened, this.awake) > SILENCE) this.lose();
  }

  lose() {
    const socket = this.socket;
    this.socket = null;
    socket?.close();
    this.onLink("lost", this.heard);
    if (!this.taken) this.ask();
    // Not all pages at the same moment, when the dashboard comes back.
    this.timer ??= setTimeout(() => this.open(), this.delay * (0.5 + Math.random() / 2));
    this.delay = Math.min(this.delay * 2, LONGEST_DELAY);
  }

  /** Why a connection was refused, a WebSocket does not say; other requests are told. */
  async ask() {
    try {
      await api("/api/pools");
    } catch (error) {
      if (error.detail !== null && this.socket === null) this.onLink("lost", this.heard, error.message);
    }
  }

  /** Do not wait any longer: somebody looks, or the network is back. */
  now() {
    if (this.timer === null) return;
    clearTimeout(this.timer);
    this.open();
  }
}

/** What the API answers; throws an Error that says what went wrong in the server's words, with its `detail`. */
export async function api(path, options = {}) {
  const init = { ...options };
  if (options.body !== undefined) {
    init.body = JSON.stringify(options.body);
    init.headers = { "Content-Type": "application/json" };
  }
  let response;
  try {
    response = await fetch(path, init);
  } catch {
    throw Object.assign(new Error("The dashboard cannot be reached."), { detail: null });
  }
  const answer = await response.json().catch(() => null);
  if (!response.ok) {
    throw Object.assign(new Error(answer?.error?.message ?? `The dashboard answered ${response.status}.`), { detail: answer?.error ?? null });
  }
  return answer;
}
