/* The fleet page: follows the server's events and draws what they say. */

import { makeCharts } from "./charts.js";
import { clock, duration, element, figure, lifetime, number, percent, renew, sentence } from "./format.js";
import { noteFleet } from "./overview.js";
import { drawModels } from "./replicas.js";
import { headers } from "./server.js";

const RETRY_MS = 1000;
const KINDS = [["ttft", "First token (TTFT)"], ["gap", "Token gap"]];
const SPANS = [["60", "Last minute"], ["900", "Last 15 minutes"]];

const at = (id) => document.getElementById(id);
const drawCharts = makeCharts(at("charts"));
let history = null;
let lastMoved = null;
let hasSeveral = false;

function draw(state) {
  hasSeveral = state.models.length > 1;
  history = state.history ?? history;
  const rate = drawModels(at("models"), state.models, state.at);
  drawTotals(state, rate);
  if (state.history) drawHistory(state);
  drawDepartures(state.departures);
  drawEvents(state.events);
  noteFleet(state);
}

/** The sums over all models, and over all routers as far as they answer. */
function drawTotals(state, rate) {
  const replicas = state.models.flatMap((model) => Object.values(model.replicas)).filter((replica) => replica.state !== "gone");
  const sum = (name) => replicas.reduce((total, replica) => total + replica[name], 0);
  const totals = history?.num_routers > 1 ? history.totals : state.router;
  const moved = totals.num_resumes + totals.num_moves;
  at("totals").replaceChildren(
    figure("Replicas serving", String(replicas.filter((replica) => replica.is_serving).length)),
    figure("Tokens/s", number(rate)),
    figure("Streams", number(totals.num_live)),
    figure("Queued", number(totals.num_waiting)),
    figure("Prefix hits", percent(sum("num_cached_prompt_tokens"), sum("num_prompt_tokens"))),
    figure("Streams moved", number(moved)),
    figure("Refused (429)", number(totals.num_refused)),
    ...(state.batches ? [figure("Batches", number(state.batches.num_unfinished))] : []),
  );
  if (lastMoved !== null && moved !== lastMoved) at("totals").children[5].classList.add("changed");
  lastMoved = moved;
}

function latencyTable(title, latency) {
  const cells = (name, texts) => texts.map((text) => element(name, "", text));
  const head = element("tr", "", element("td", ""), ...cells("th", ["p50", "p90", "p99", "samples"]));
  for (const cell of head.querySelectorAll("th")) cell.scope = "col";
  const rows = KINDS.map(([kind, name]) => {
    const { num, p50_s, p90_s, p99_s } = latency[kind];
    const heading = element("th", "", name);
    heading.scope = "row";
    return element("tr", "", heading, ...cells("td", [duration(p50_s), duration(p90_s), duration(p99_s), number(num)]));
  });
  return element("table", "", element("caption", "", title), element("thead", "", head), element("tbody", "", ...rows));
}

function drawHistory({ at: now, router_id: routerId, history: { latency, points, span_s: span, num_routers: numRouters } }) {
  at("latency").replaceChildren(...SPANS.map(([seconds, title]) => latencyTable(title, latency[seconds])));
  const whose = numRouters > 1 ? ` ${numRouters === 2 ? "Both" : `All ${numRouters}`} routers are counted together; events and departures are what router ${routerId} saw.` : "";
  at("scope").textContent = `Measured in the router, from the request's arrival to its first token, and between one arrival of a stream's tokens and the next.${whose}`;
  drawCharts(points, now, span);
}

function drawDepartures(departures) {
  renew(at("departures"), departures, () =>
    departures.length
      ? departures.map((one) => {
          const head = element("p", "", element("span", "id", one.replica_id), element("span", "cause", one.cause), timeOf(one.at));
          const where = one.node ? ` on ${one.node}` : "";
          return element("li", one.is_failure ? "failure" : "", head, element("p", "", `${ofModel(one)}${sentence(one.why)}. Seen${where} for ${lifetime(one.lived_s)}.`));
        })
      : [element("li", "empty", "None in the last 15 minutes.")],
  );
}

function timeOf(when) {
  const time = element("time", "", clock(when));
  time.dateTime = new Date(1000 * when).toISOString();
  return time;
}

/** Which model an event is about, where there are several. */
function ofModel(one) {
  return hasSeveral ? `${one.model}: ` : "";
}

function drawEvents(events) {
  renew(at("events"), events, () =>
    events.length
      ? events.map((one) => element("li", one.is_bad ? "bad" : "", timeOf(one.at), element("span", "", ofModel(one) + one.text)))
      : [element("li", "empty", "None in the last 15 minutes.")],
  );
}

function tell(text, isLost) {
  if (at("live").textContent !== text) at("live").textContent = text;
  at("live").classList.toggle("lost", isLost);
}

async function follow() {
  for (;;) {
    try {
      const response = await fetch("rayline/events", { headers: headers() });
      if (response.status === 401) {
        tell("This server asks for an API key: set it in the chat page's settings", true);
        return;
      }
      if (!response.ok) throw new Error(String(response.status));
      tell("live", false);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) if (part.startsWith("data: ")) draw(JSON.parse(part.slice(6)));
      }
    } catch {
      /* the server is gone; it may come back */
    }
    tell("connection lost, trying again", true);
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

follow();
