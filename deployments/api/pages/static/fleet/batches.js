/* Batches: those of the reader's own key, and for administrators the unfinished ones of all keys. */

import { count, dateTime, element, exact, meter, percent } from "./format.js";
import { get } from "./server.js";
import { Table } from "./table.js";

const NUM_OWN = 20, NUM_ALL = 100;
const section = document.getElementById("batches");

const table = new Table(section.querySelector("div"), {
  caption: "Yours, and for administrators the unfinished ones of all keys",
  noun: ["batch", "batches"],
  by: 6,
  text: ({ id, key, model, endpoint, status }) => `${id} ${key} ${model ?? ""} ${endpoint} ${status}`,
  columns: [
    { name: "Batch", isText: true, value: ({ id }) => id, write: ({ id }) => element("span", "id", id) },
    { name: "Key", isText: true, value: ({ key }) => key || "none" },
    { name: "Model", isText: true, value: ({ model, status }) => model ?? (status === "validating" ? "not read yet" : "several") },
    { name: "Status", isText: true, value: ({ status }) => status.replace("_", " ") },
    { name: "Lines", value: ({ request_counts: { completed, failed, total } }) => (completed + failed) / Math.max(total, 1), write: writeProgress },
    { name: "Tokens", value: ({ usage }) => usage.total_tokens, write: ({ usage }) => exact(usage.total_tokens) },
    { name: "Made", value: ({ created_at: made }) => made, write: ({ created_at: made }) => dateTime(1000 * made) },
    { name: "Until", value: (batch) => until(batch), write: (batch) => dateTime(1000 * until(batch)) },
  ],
});

/** When it has ended, or ends at the latest. */
const until = (batch) => batch.completed_at ?? batch.failed_at ?? batch.expired_at ?? batch.cancelled_at ?? batch.expires_at;

function writeProgress({ request_counts: { completed, failed, total }, errors }) {
  if (errors) return count(errors.data.length, "fault in its file", "faults in its file");
  const bar = meter("lines", "used", "spent"), share = (num) => `${(100 * num) / Math.max(total, 1)}%`;
  bar.children[0].style.width = share(completed);
  bar.children[1].style.width = share(failed);
  bar.setAttribute("aria-label", `${percent(completed + failed, total)} done`);
  return element("div", "", `${exact(completed)} of ${exact(total)}${failed ? `, ${exact(failed)} failed` : ""}`, bar);
}

/**
 * Ask for batches, and show them.
 *
 * @param own the name of the reader's key.
 * @param isAdmin whether those of other keys may be asked for.
 */
export async function drawBatches(own, isAdmin) {
  const lists = await Promise.all([get(`v1/batches?limit=${NUM_OWN}`), ...(isAdmin ? [get(`rayline/batches?limit=${NUM_ALL}`)] : [])]);
  const found = new Map(lists.flatMap(({ data }) => data).map((batch) => [batch.id, { key: own, ...batch }]));
  table.show([...found.values()]);
  section.hidden = !found.size;
}
