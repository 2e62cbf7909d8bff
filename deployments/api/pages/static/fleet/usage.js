/* What API keys have used and have left: for administrators. */

import { dateTime, element, exact, meter, percent } from "./format.js";
import { get } from "./server.js";
import { Table } from "./table.js";

const DAY_MS = 24 * 3600 * 1000;
const at = (id) => document.getElementById(id);
const of = (name) => ({ value: (row) => row[name], write: (row) => exact(row[name]) });
const sum = (values) => Object.values(values).reduce((total, value) => total + value, 0);

/** What stands for a key's or a model's empty name. */
const named = (name) => name || "none";

const rows = new Table(at("usage-rows"), {
  caption: "By key and model",
  noun: ["row", "rows"],
  by: 5,
  text: ({ key, model }) => `${key} ${model}`,
  columns: [
    { name: "Key", value: ({ key }) => named(key), isText: true },
    { name: "Model", value: ({ model }) => named(model), isText: true },
    { name: "Requests", ...of("requests") },
    { name: "Prompt tokens", ...of("prompt_tokens") },
    { name: "Cached", ...of("cached_tokens") },
    { name: "Output tokens", ...of("output_tokens") },
    { name: "Refused", value: ({ refusals }) => sum(refusals), write: writeRefusals },
  ],
});

const keys = new Table(at("key-rows"), {
  caption: "Keys and budgets",
  noun: ["key", "keys"],
  by: 2,
  text: ({ key, role, models }) => `${key} ${role} ${(models ?? []).join(" ")}`,
  columns: [
    { name: "Key", value: ({ key }) => key, isText: true },
    { name: "Role", value: ({ role }) => role, isText: true },
    { name: "Today", ...budget("tokens_per_day") },
    { name: "This month", ...budget("tokens_per_month") },
    { name: "Expires", value: ({ expires_at: when }) => (when ? Date.parse(when) : Infinity), write: ({ expires_at: when }) => (when ? dateTime(when) : "never") },
  ],
});

/** How many requests were refused, and why. */
function writeRefusals({ refusals }) {
  const kinds = Object.entries(refusals).sort(([, a], [, b]) => b - a).map(([kind, num]) => element("small", "", `${kind} ${exact(num)}`));
  return element("div", "", exact(sum(refusals)), ...kinds);
}

/** A column of one of the budgets: what is left of it, as a bar and in tokens. */
function budget(name) {
  const value = ({ budgets: { [name]: one } }) => (one ? one.used / one.limit : -1);
  const write = ({ budgets: { [name]: one } }) => {
    if (!one) return "no limit";
    const share = Math.min(1, one.used / one.limit), bar = meter("budget", one.left ? "used" : "spent");
    bar.firstChild.style.width = `${100 * share}%`;
    bar.setAttribute("aria-label", `${percent(share, 1)} used`);
    return element("div", "", `${exact(one.left)} of ${exact(one.limit)} left`, bar);
  };
  return { value, write };
}

/** First and last day of the period that is chosen, in UTC, as the server counts. */
function period(now = new Date()) {
  const year = now.getUTCFullYear(), month = now.getUTCMonth(), today = Date.UTC(year, month, now.getUTCDate());
  const spans = {
    today: [today, today],
    week: [today - 6 * DAY_MS, today],
    month: [Date.UTC(year, month, 1), today],
    "last-month": [Date.UTC(year, month - 1, 1), Date.UTC(year, month, 0)],
  };
  return spans[at("period").value].map((day) => new Date(day).toISOString().slice(0, 10));
}

/** Ask what has been used, and show it. */
export async function drawUsage() {
  const [first, last] = period();
  let report;
  try {
    report = await get(`rayline/usage?by=period&from=${first}&to=${last}`);
  } catch (error) {
    at("used").textContent = `Usage cannot be shown now: ${error.message}`;
    return;
  } finally {
    at("usage").hidden = false;
  }
  if (period().join() !== [first, last].join()) return; // another one has been chosen meanwhile
  const { total } = report, days = first === last ? first : `${first} to ${last}`;
  at("used").textContent =
    `${days} in UTC: ${exact(total.requests)} requests, ${exact(total.prompt_tokens)} prompt tokens ` +
    `(${exact(total.cached_tokens)} from the prefix cache), ${exact(total.output_tokens)} output tokens, ${exact(sum(total.refusals))} requests refused`;
  rows.show(report.data);
  at("key-rows").hidden = !report.keys.length;
  keys.show(report.keys);
}

at("period").addEventListener("change", drawUsage);
