/* The replicas of one model: a heading, and a card each. */

import { bytes, count, element, figure, meter, number, percent, sentence } from "./format.js";

const MAX_DOTS = 240;
const isGone = (replica) => replica.state === "gone";

/** Tokens/s of each replica, smoothed over a second or two. */
class Rates {
  #last = new Map();

  of(id, total, at) {
    const last = this.#last.get(id);
    if (!last || total < last.total) {
      this.#last.set(id, { total, at, value: 0 });
      return 0;
    }
    const seconds = at - last.at;
    if (seconds < 0.05) return last.value;
    const value = last.value + (1 - Math.exp(-seconds)) * ((total - last.total) / seconds - last.value);
    this.#last.set(id, { total, at, value });
    return value;
  }

  keep(ids) {
    for (const id of this.#last.keys()) if (!ids.has(id)) this.#last.delete(id);
  }
}

const rates = new Rates();

/** What the model's heading says beside its name. */
function facts(model, rate) {
  const { engine, replicas } = model;
  const serving = Object.values(replicas).filter((replica) => replica.is_serving).length;
  const [fewest, most] = model.wanted;
  const parts = [fewest === most ? `${serving} of ${count(most, "replica", "replicas")} serving` : `${count(serving, "replica", "replicas")} serving, ${fewest} to ${most} allowed`];
  if (model.state === "asleep") parts.push("asleep until the next request");
  if (model.aliases.length) parts.push(`also called ${model.aliases.join(", ")}`);
  if (engine) parts.push(engine.backend === "emulated" ? "emulated engine" : `${engine.dtype} on ${engine.device.split(":")[0].toUpperCase()}`);
  if (engine) parts.push(`context of ${engine.max_seq_len.toLocaleString("en")} tokens`);
  const present = Object.values(replicas).filter((replica) => !isGone(replica));
  const sum = (name) => present.reduce((total, replica) => total + replica[name], 0);
  parts.push(`${number(rate)} tokens/s`, `${number(sum("num_running"))} running`, `${number(sum("num_waiting"))} waiting`);
  return parts.join(" · ");
}

function makeSection(model) {
  const section = element("section", "model");
  section.dataset.model = model.name;
  const heading = element("h2", "", model.name);
  heading.id = `model-${model.name}`;
  section.setAttribute("aria-labelledby", heading.id);
  const list = element("ul", "replicas");
  list.setAttribute("aria-label", `Replicas of ${model.name}`);
  section.append(element("div", "heading", heading, element("span", "facts")), element("p", "note scaling"), list);
  return section;
}

/** Draw every model's replicas; returns the tokens/s of all together. */
export function drawModels(target, models, at) {
  const old = new Map([...target.children].map((section) => [section.dataset.model, section]));
  let total = 0;
  const ids = new Set();
  const sections = models.map((model) => {
    const section = old.get(model.name) ?? makeSection(model);
    let modelRate = 0;
    const scaling = section.querySelector(".scaling");
    scaling.textContent = model.scaling ?? "";
    scaling.hidden = !model.scaling;
    const list = section.querySelector(".replicas");
    const cards = new Map([...list.children].map((card) => [card.dataset.id, card]));
    const known = Object.entries(model.replicas).sort(([a], [b]) => (a < b ? -1 : 1));
    const drawn = known.map(([id, replica]) => {
      ids.add(id);
      const rate = isGone(replica) ? 0 : rates.of(id, replica.num_generated_tokens, at);
      modelRate += rate;
      return drawCard(cards.get(id) ?? makeCard(id), replica, rate);
    });
    if (!drawn.length) drawn.push(element("li", "empty", "No replica yet."));
    if (drawn.length !== list.children.length || drawn.some((card, place) => list.children[place] !== card)) list.replaceChildren(...drawn);
    section.querySelector(".facts").textContent = facts(model, modelRate);
    total += modelRate;
    return section;
  });
  if (sections.some((section, place) => target.children[place] !== section) || sections.length !== target.children.length) target.replaceChildren(...sections);
  rates.keep(ids);
  return total;
}

function makeCard(id) {
  const card = element("li", "replica");
  card.dataset.id = id;
  card.append(
    element("h3", "", element("span", "id", id), element("span", "state")),
    element("p", "why"),
    element("p", "node"),
    element("div", "machine"),
    element("p", "legend cache", element("span", "", "KV cache"), element("span")),
    meter("pool", "used", "cached"),
    element("div", "streams"),
    element("p", "adapters"),
    element("dl", "figures"),
  );
  card.querySelector(".streams").setAttribute("aria-hidden", "true");
  return card;
}

function drawCard(card, replica, rate) {
  card.dataset.state = replica.state;
  card.querySelector(".state").textContent = replica.state;
  card.querySelector(".why").textContent = sentence(replica.why);
  drawMachine(card, replica.machine);
  drawPool(card, replica);
  drawStreams(card.querySelector(".streams"), replica);
  card.querySelector(".adapters").textContent = isGone(replica) ? "" : describeAdapters(replica.adapters);
  card.querySelector(".figures").replaceChildren(
    figure("Tokens/s", number(rate)),
    figure("Running", isGone(replica) ? "0" : `${replica.num_running} of ${replica.max_rows}`),
    figure("Waiting", isGone(replica) ? "0" : number(replica.num_waiting)),
    figure("Prefix hits", percent(replica.num_cached_prompt_tokens, replica.num_prompt_tokens)),
    figure("To prefill", number(replica.num_waiting_tokens)),
    figure("Preempted", number(replica.num_preemptions)),
  );
  return card;
}

/** Which adapters it holds: some by name, the others as a number. */
function describeAdapters({ num, names }) {
  if (!num) return "";
  const others = num - names.length;
  const rest = names.length ? `and ${number(others)} more` : count(others, "without a name", "without names");
  return `Adapters: ${[...names, ...(others ? [rest] : [])].join(", ")}`;
}

/** What is shown of a GPU: its memory as a bar, and how busy it is. */
function describeGpu(gpu) {
  const busy = gpu.busy_percent === null ? "" : ` · ${gpu.busy_percent} % busy`;
  return {
    name: `GPU ${gpu.index}`,
    use: `${bytes(gpu.used_bytes).replace(/ GiB$/, "")} of ${bytes(gpu.total_bytes)}${busy}`,
    share: gpu.used_bytes / gpu.total_bytes,
    what: "of its memory in use",
  };
}

function describeCpu(machine) {
  return {
    name: "CPU",
    use: `${machine.busy_cores.toFixed(1)} of ${count(machine.num_cores, "core", "cores")} · ${bytes(machine.memory_bytes)}`,
    share: machine.busy_cores / machine.num_cores,
    what: "of the cores busy",
  };
}

/** Where it runs: each of its GPUs with its memory and use, or else the CPU. */
function drawMachine(card, machine) {
  const target = card.querySelector(".machine"), gpus = machine?.gpus ?? [];
  const kind = gpus.length ? ` · ${gpus.length > 1 ? `${gpus.length} × ` : ""}${gpus[0].name}` : "";
  card.querySelector(".node").textContent = machine ? `${machine.node}${kind} · process ${machine.pid}` : "Node not known";
  const wanted = machine ? Math.max(gpus.length, 1) : 0;
  while (target.children.length > wanted) target.lastChild.remove();
  while (target.children.length < wanted) target.append(element("div", "device", element("p", "legend", element("span"), element("span")), meter("memory", "taken")));
  if (!machine) return;
  const devices = gpus.length ? gpus.map(describeGpu) : [describeCpu(machine)];
  devices.forEach((device, place) => {
    const row = target.children[place], [name, use] = row.querySelectorAll("span"), share = Math.min(1, device.share);
    name.textContent = device.name;
    use.textContent = device.use;
    row.querySelector("i").style.width = `${100 * share}%`;
    row.querySelector(".meter").setAttribute("aria-label", `${device.name}: ${percent(share, 1)} ${device.what}`);
  });
}

function drawPool(card, replica) {
  const bar = card.querySelector(".pool"), share = (pages) => `${(100 * pages) / Math.max(replica.num_pages, 1)}%`;
  bar.querySelector(".used").style.width = share(replica.num_used_pages);
  bar.querySelector(".cached").style.width = share(replica.num_cached_pages);
  const tokens = (pages) => number(pages * replica.page_size);
  const text = `${tokens(replica.num_used_pages)} used · ${tokens(replica.num_cached_pages)} cached of ${tokens(replica.num_pages)} tokens`;
  card.querySelector(".cache").lastChild.textContent = text;
  bar.setAttribute("aria-label", `KV cache: ${text}`);
}

/** A dot for each request: full while it runs, a ring while it waits. */
function drawStreams(dots, replica) {
  const running = isGone(replica) ? 0 : Math.min(replica.num_running, MAX_DOTS);
  const wanted = isGone(replica) ? 0 : Math.min(replica.num_running + replica.num_waiting, MAX_DOTS);
  while (dots.children.length > wanted) dots.lastChild.remove();
  while (dots.children.length < wanted) dots.append(element("b"));
  [...dots.children].forEach((dot, place) => dot.classList.toggle("waits", place >= running));
}

