/* How figures are written, and elements made. */

export const number = (value) => {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)}M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(0)}k`;
  return value.toLocaleString("en", { maximumFractionDigits: 0 });
};

/** A whole number, to the last digit: what is accounted for is not rounded. */
export const exact = (value) => value.toLocaleString("en");

export const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(0)} %` : "–");

export const bytes = (value) => {
  if (value >= 2 ** 30) return `${(value / 2 ** 30).toFixed(value >= 100 * 2 ** 30 ? 0 : 1)} GiB`;
  return `${(value / 2 ** 20).toFixed(0)} MiB`;
};

// `toPrecision` alone writes what it rounds up to the next power of ten with an exponent.
const rounded = (value, numDigits) => String(Number(value.toPrecision(numDigits)));

/** A duration in the unit that suits it, to three figures; a dash for none. */
export const duration = (seconds) => {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds >= 100) return `${seconds.toFixed(0)} s`;
  if (seconds >= 1) return `${rounded(seconds, 3)} s`;
  return `${rounded(1000 * seconds, seconds >= 0.1 ? 3 : 2)} ms`;
};

/** How long something lasted, to the minute once it is long. */
export const lifetime = (seconds) => {
  if (seconds < 60) return `${seconds.toFixed(0)} s`;
  if (seconds < 3600) return `${(seconds / 60).toFixed(0)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
};

/** A moment in the reader's own time, to the minute. */
export const dateTime = (at) => new Date(at).toLocaleString(undefined, { dateStyle: "short", timeStyle: "short" });

export const clock = (at) => new Date(1000 * at).toLocaleTimeString();

export const count = (num, one, many) => `${number(num)} ${num === 1 ? one : many}`;

/** A text with a capital at its beginning. */
export const sentence = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);

export function element(name, cls, ...children) {
  const made = document.createElement(name);
  if (cls) made.className = cls;
  made.append(...children);
  return made;
}

export const figure = (name, value) => element("div", "", element("dt", "", name), element("dd", "", value));

/** A bar of one or more parts, whose widths and label whoever draws it sets. */
export function meter(cls, ...parts) {
  const bar = element("div", `meter ${cls}`, ...parts.map((part) => element("i", part)));
  bar.setAttribute("role", "img");
  return bar;
}

/** Replace what an element holds, but only when `state` is not what it was last made from. */
export function renew(target, state, make) {
  const key = JSON.stringify(state);
  if (target.dataset.state === key) return;
  target.dataset.state = key;
  target.replaceChildren(...make());
}
