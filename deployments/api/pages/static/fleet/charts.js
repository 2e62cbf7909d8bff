/* The curves of the last 15 minutes. */

import { duration, element, number } from "./format.js";

const WIDTH = 900, HEIGHT = 60, SVG = "http://www.w3.org/2000/svg";

const CHARTS = [
  { name: "Tokens/s", of: (point) => point.tokens_per_s, write: number },
  { name: "Streams", of: (point) => point.num_live, write: number },
  { name: "Median time to first token", of: (point) => point.ttft_p50_s, write: duration },
];

const shape = (name) => document.createElementNS(SVG, name);

function make(chart) {
  const figure = element("figure", "chart");
  const peak = element("span", "peak"), svg = shape("svg"), area = shape("path"), line = shape("path");
  for (const [name, value] of Object.entries({ viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" })) svg.setAttribute(name, value);
  area.setAttribute("class", "area");
  line.setAttribute("class", "line");
  svg.append(area, line);
  const axis = element("div", "axis", element("span", "", "15 min ago"), element("span", "", "now"));
  figure.append(element("figcaption", "", element("span", "", chart.name), peak), svg, axis);
  return { figure, peak, svg, area, line };
}

/** Runs of points whose value is known: where there is none, the curve has a gap. */
function runs(points, of) {
  const found = [[]];
  for (const point of points) {
    const value = of(point);
    if (value === null || value === undefined) found.push([]);
    else found.at(-1).push([point.at, value]);
  }
  return found.filter((run) => run.length);
}

/**
 * Make the charts in an element.
 *
 * @returns a function that draws them from points of the history, now being a Unix time.
 */
export function makeCharts(target) {
  const made = CHARTS.map((chart) => ({ ...chart, ...make(chart) }));
  target.append(...made.map(({ figure }) => figure));
  return (points, now, span) => {
    for (const { name, of, write, peak, svg, area, line } of made) {
      const known = runs(points, of), values = known.flat().map(([, value]) => value);
      const top = Math.max(...values, 0);
      const x = (at) => Math.min(WIDTH, Math.max(0, WIDTH * (1 - (now - at) / span))).toFixed(1);
      const y = (value) => (HEIGHT - 2 - (HEIGHT - 6) * (top ? value / top : 0)).toFixed(1);
      // A single point is drawn as a short stroke.
      const curve = (run) => run.map(([at, value]) => `${x(at)},${y(value)}`).join(" L") + ` L${x(run.at(-1)[0] + 5)},${y(run.at(-1)[1])}`;
      line.setAttribute("d", known.map((run) => `M${curve(run)}`).join(" "));
      area.setAttribute("d", known.map((run) => `M${x(run[0][0])},${HEIGHT} L${curve(run)} L${x(run.at(-1)[0] + 5)},${HEIGHT} Z`).join(" "));
      const told = values.length ? `peak ${write(top)}` : "no data yet";
      peak.textContent = told;
      svg.setAttribute("aria-label", `${name} over the last 15 minutes: ${told}`);
    }
  };
}
