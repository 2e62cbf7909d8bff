/* The adapters of each model: where they come from, and which replicas hold them. For administrators. */

import { count, dateTime, element, exact } from "./format.js";
import { get } from "./server.js";
import { Table } from "./table.js";

const SOURCES = { configured: "configuration", folder: "folder", requested: "request" };
const faults = document.getElementById("faults");
/** Of each model's section, its table. */
const tables = new WeakMap();

function tableOf(section) {
  if (!tables.has(section)) {
    const details = element("details", "", element("summary"), element("div"));
    section.append(details);
    tables.set(section, { details, table: makeTable(details.lastChild, section.dataset.model) });
  }
  return tables.get(section);
}

function makeTable(target, model) {
  return new Table(target, {
    caption: `Adapters of ${model}`,
    noun: ["adapter", "adapters"],
    by: 1,
    text: ({ name, path, source }) => `${name} ${path} ${SOURCES[source]}`,
    columns: [
      { name: "Adapter", isText: true, value: ({ name }) => name },
      {
        name: "Held by",
        value: ({ held_by: replicas }) => replicas.length,
        write: ({ held_by: replicas }) => (replicas.length ? count(replicas.length, "replica", "replicas") : "none: read when it is asked for"),
      },
      { name: "From", isText: true, value: ({ source }) => SOURCES[source] },
      { name: "Directory", isText: true, value: ({ path }) => path, write: ({ path }) => element("span", "id", path) },
      { name: "Written", value: ({ created }) => created, write: ({ created }) => dateTime(1000 * created) },
    ],
  });
}

/** Ask for the adapters, and show them with their models. */
export async function drawAdapters() {
  const report = await get("rayline/adapters");
  for (const section of document.querySelectorAll("#models .model")) {
    const own = report.data.filter(({ model }) => model === section.dataset.model);
    if (!own.length && !tables.has(section)) continue;
    const { details, table } = tableOf(section), held = own.filter(({ held_by: replicas }) => replicas.length);
    details.hidden = !own.length;
    details.querySelector("summary").textContent = `${count(own.length, "adapter", "adapters")}, ${exact(held.length)} held by replicas`;
    table.show(own);
  }
  const wrong = Object.entries(report.faults);
  faults.hidden = !wrong.length;
  faults.querySelector("ul").replaceChildren(...wrong.map(([name, why]) => element("li", "", element("strong", "", name), ` ${why}`)));
}
