/* Small helpers around the document. Text only ever becomes text here, never HTML. */

export const $ = (id) => document.getElementById(id);

/** A node: `on…` attributes are listeners, those whose value is undefined or false are left out. */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const ICONS = {
  close: "M6 6l12 12M18 6 6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  done: "M5 13l4.5 4.5L19 7",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  left: "M14.5 6l-6 6 6 6",
  more: "M5.5 12h.01M12 12h.01M18.5 12h.01",
  retry: "M20 11a8 8 0 1 0-2.3 5.7M20 4v7h-7",
  right: "M9.5 6l6 6-6 6",
};

/** One of the page's own signs; beside a text or a label, so that readers aloud skip it. */
function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", `icon ${name}`);
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows a sign alone and says `label` to whoever points at it or listens. */
export function iconButton(name, label, onclick, attributes = {}) {
  return element(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes },
    icon(name),
  );
}

/** An id that no other tab makes. `randomUUID` is missing where the page came over plain HTTP from another machine. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Copy a text; also where the clipboard's own interface is missing, as over plain HTTP from another machine. */
async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const area = element("textarea", { class: "hidden", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A button that copies what `text()` gives and shows for a moment that it did. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    await copyText(text());
    say("Copied");
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Tell those who listen to the page. */
export function say(text) {
  $("said").textContent = text;
}

let closing = 0;

/** A line at the page's foot for some seconds, with something that can be done about it. */
export function notify(text, action = null) {
  clearTimeout(closing);
  const close = () => $("notice").replaceChildren();
  const act =
    action &&
    element(
      "button",
      {
        type: "button",
        class: "act",
        onclick: () => {
          close();
          action.run();
        },
      },
      action.label,
    );
  $("notice").replaceChildren(
    element("div", { class: "notice" }, element("span", {}, text), act, iconButton("close", "Dismiss", close)),
  );
  closing = setTimeout(close, 10_000);
}

/** Hand the browser a file to save. */
export function download(name, text, type) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** What is kept under a name in "localStorage" or "sessionStorage", or the fallback. */
export function recall(storage, name, fallback) {
  try {
    return JSON.parse(window[storage].getItem(name)) ?? fallback;
  } catch {
    return fallback; // unreadable, or the browser keeps nothing
  }
}

/** Keep a value under a name; undefined to forget it. */
export function keep(storage, name, value) {
  try {
    if (value === undefined) window[storage].removeItem(name);
    else window[storage].setItem(name, JSON.stringify(value));
  } catch {
    /* full, or the browser keeps nothing: it lasts as long as the page */
  }
}
