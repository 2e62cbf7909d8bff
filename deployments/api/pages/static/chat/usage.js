/* What the key has used and has left, in the settings dialog. */

import { $, element } from "./dom.js";
import { served, usage } from "./server.js";

const PERIODS = { tokens_per_day: "today", tokens_per_month: "this month" };
const exact = (value) => value.toLocaleString("en");
const sum = (values) => Object.values(values).reduce((total, value) => total + value, 0);
const plural = (num, one, many) => `${exact(num)} ${num === 1 ? one : many}`;

/** Ask for it and show it; nothing before the server has answered with this key. */
export async function drawUsage() {
  $("usage").hidden = served.chosen === null;
  if (served.chosen === null) return;
  const target = $("usage").querySelector("div");
  let used;
  try {
    used = await usage();
  } catch (error) {
    target.replaceChildren(element("p", { class: "hint" }, `It cannot be shown now: ${error.message}`));
    return;
  }
  $("usage-title").textContent = used.key ? `Usage of the key ${used.key}` : "Usage";
  target.replaceChildren(...Object.entries(used.budgets).map(drawBudget), drawPeriods(used));
}

/** What is left of a budget, as a bar and in words. */
function drawBudget([name, { limit, used, left, renews_at: renewsAt }]) {
  const id = `budget-${name}`;
  const renews = new Date(renewsAt).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
  const text = `${exact(left)} of ${exact(limit)} tokens left ${PERIODS[name]}; renewed on ${renews}`;
  return element(
    "div",
    { class: "budget" },
    element("label", { for: id }, text),
    element("meter", { id, max: limit, value: Math.min(used, limit), high: 0.9 * limit, optimum: 0 }),
  );
}

/** Today and this month, in all and by model where there are several. */
function drawPeriods({ today, this_month: month }) {
  const rows = [["Today", today], ["This month", month]];
  const models = Object.entries(month.models).filter(([model]) => model);
  if (models.length > 1) rows.push(...models.map(([model, one]) => [`This month, ${model}`, one]));
  return element(
    "dl",
    {},
    ...rows.flatMap(([name, one]) => [element("dt", {}, name), element("dd", {}, inWords(one))]),
  );
}

function inWords(used) {
  const parts = [
    plural(used.requests, "request", "requests"),
    `${plural(used.prompt_tokens, "prompt token", "prompt tokens")} (${exact(used.cached_tokens)} cached)`,
    plural(used.output_tokens, "output token", "output tokens"),
  ];
  const refused = sum(used.refusals);
  if (refused) parts.push(`${exact(refused)} refused`);
  return parts.join(" · ");
}
