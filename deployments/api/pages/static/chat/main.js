/* The chat page: which conversation is shown, and what its parts tell each other. */

import { answer, isAnswering, stop } from "./answers.js";
import { Composer } from "./composer.js";
import * as conversations from "./conversations.js";
import { $, element, keep, notify, say } from "./dom.js";
import { exportAs, importFile } from "./exchange.js";
import { promptsFor } from "./prompts.js";
import { learnModels, served } from "./server.js";
import * as settings from "./settings.js";
import { Sidebar, isSideOpen, toggleSide } from "./sidebar.js";
import { Thread } from "./thread.js";

const { changes } = conversations;
let current = conversations.create();

const thread = new Thread(drawEmpty);
const sidebar = new Sidebar({ open: (conversation) => show(conversation.id), current: () => current });
const composer = new Composer({ onsend: send, onstop: () => stop(current), isAnswering: () => isAnswering(current) });

/* ---- Which conversation ---- */

/** Show a conversation by its address, so that a reload and the way back find it; "" for a new one. */
function show(id) {
  toggleSide(false);
  if (location.hash.slice(1) === id) open();
  else location.hash = id;
}

async function open() {
  const known = conversations.find(location.hash.slice(1));
  if (known) await conversations.load(known);
  current = known ?? conversations.create();
  thread.show(current);
  composer.open(known ? current.id : "new");
  drawTitle();
  sidebar.draw();
}

function drawTitle() {
  $("title").textContent = current.title;
  $("more").hidden = !conversations.find(current.id);
  document.title = `${conversations.find(current.id) ? current.title : (served.chosen ?? "Chat")} · Rayline`;
}

function drawEmpty() {
  const ideas = served.chosen === null ? [] : promptsFor(served.chosen);
  return element(
    "div",
    { id: "empty" },
    element("h2", {}, "What would you like to know?"),
    element("p", {}, served.chosen === null ? "" : `Answers come from ${served.chosen}, on your own machines.`),
    element(
      "div",
      { id: "ideas" },
      ...ideas.map((idea) => element("button", { type: "button", onclick: () => send({ content: idea }) }, idea)),
    ),
  );
}

function send(message) {
  if (isAnswering(current)) return;
  const parent = conversations.branch(current).at(-1) ?? null;
  const sent = conversations.add(current, parent, { role: "user", ...message });
  history.replaceState(null, "", `#${current.id}`);
  composer.open(current.id);
  answer(current, sent);
  say("Answering");
  $("log").scrollTop = $("log").scrollHeight;
}

/* ---- What happens elsewhere ---- */

changes.addEventListener("list", () => {
  composer.draw();
  drawTitle();
});
changes.addEventListener("message", ({ detail: { conversationId, status } }) => {
  if (conversationId === current.id && status === 401) settings.openSettings("The API key is missing or wrong.");
});
changes.addEventListener("unsaved", ({ detail: error }) => {
  notify(`The browser could not keep this conversation: ${error?.message ?? "it is full"}`);
});
changes.addEventListener("deleted", ({ detail: id }) => {
  if (id === current.id) queueMicrotask(() => show(""));
});

/* ---- Models ---- */

async function drawModels() {
  try {
    await learnModels();
  } catch (error) {
    $("model").textContent = error.status === 401 ? "" : "no answer from the server";
    if (error.status === 401) settings.openSettings("This server asks for an API key.");
    return;
  }
  const isChoice = served.names.length > 1;
  $("model").hidden = isChoice;
  $("models").hidden = !isChoice;
  $("model").textContent = served.chosen;
  $("models").replaceChildren(
    ...served.names.map((name) => element("option", { selected: name === served.chosen }, name)),
  );
  thread.draw();
  drawTitle();
}

$("models").addEventListener("change", () => {
  served.chosen = $("models").value;
  keep("localStorage", "rayline.model", served.chosen);
  thread.draw();
});

/* ---- Controls ---- */

async function importFiles() {
  const files = [...$("import-files").files];
  $("import-files").value = "";
  $("settings").close();
  for (const file of files) {
    try {
      const read = await importFile(file);
      show(read[0].id);
      notify(read.length === 1 ? `Imported “${read[0].title}”` : `Imported ${read.length} conversations`);
    } catch (error) {
      notify(`${file.name} cannot be imported: ${error.message}`);
    }
  }
}

$("new").addEventListener("click", () => show(""));
$("sides").addEventListener("click", () => toggleSide(!isSideOpen()));
$("shade").addEventListener("click", () => toggleSide(false));
$("import").addEventListener("click", () => $("import-files").click());
$("import-files").addEventListener("change", importFiles);
$("export").addEventListener("click", () => exportAs("json", conversations.list()));
document.addEventListener("keydown", (event) => {
  const withControl = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && !$("settings").open && !$("menu").matches(":popover-open")) {
    if (isSideOpen()) toggleSide(false);
    else stop(current);
  } else if (withControl && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    show("");
  } else if (withControl && event.key.toLowerCase() === "k") {
    event.preventDefault();
    toggleSide(true);
    $("search").focus();
  }
});
addEventListener("hashchange", open);

settings.begin(drawModels);
await conversations.begin();
await open();
await drawModels();
