/* The conversation that is shown: its messages, drawn as they grow, and what can be done with each. */

import { answer, goOn, isAnswering } from "./answers.js";
import * as conversations from "./conversations.js";
import { $, copyButton, element, iconButton, say } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NEAR_END_PX = 80;
const FOLLOWED = new Set(["P", "LI", "UL", "OL", "DIV", "PRE", "CODE", "BLOCKQUOTE", "H3", "H4", "H5", "H6"]);

/** Draws one conversation after another into the log. */
export class Thread {
  #views = new Map(); // by message id, of the messages that are shown
  #dirty = new Set();
  #drawnInMs = 0;
  conversation = null;

  /** drawEmpty: what an empty conversation shows. */
  constructor(drawEmpty) {
    this.log = $("log");
    this.drawEmpty = drawEmpty;
    const { changes } = conversations;
    changes.addEventListener("conversation", ({ detail: id }) => id === this.conversation?.id && this.draw());
    changes.addEventListener("message", ({ detail: message }) => this.#drawSoon(message));
    this.log.addEventListener("scroll", () => this.#showJump());
    new ResizeObserver(() => this.#showJump()).observe(this.log);
    $("jump").addEventListener("click", () => this.#toEnd());
  }

  /** Show a conversation from its end. */
  show(conversation) {
    this.conversation = conversation;
    this.#views.clear();
    this.log.replaceChildren();
    this.draw();
    this.#toEnd();
  }

  /** Draw what has changed: messages that came or went, or whose place on other branches did. */
  draw() {
    const wasAtEnd = this.#isAtEnd();
    const shown = conversations.branch(this.conversation);
    const views = shown.map((message) => this.#views.get(message.id) ?? viewOf(this, message));
    this.#views = new Map(shown.map((message, index) => [message.id, views[index]]));
    if (!shown.length) {
      this.log.replaceChildren(this.drawEmpty());
      return;
    }
    const nodes = views.map(({ node }) => node);
    [...this.log.children].filter((node) => !nodes.includes(node)).forEach((node) => node.remove());
    nodes.forEach((node, index) => {
      if (this.log.children[index] !== node) this.log.insertBefore(node, this.log.children[index] ?? null);
    });
    for (const view of views) view.draw();
    if (wasAtEnd) this.#toEnd();
  }

  isLast(message) {
    return this.conversation.leafId === message.id;
  }

  /** Draw a message at most once a frame, and less often where that takes long. */
  #drawSoon(message) {
    if (!this.#views.has(message.id)) return;
    this.#dirty.add(message.id);
    if (this.#dirty.size > 1) return;
    setTimeout(() => requestAnimationFrame(() => this.#drawDirty()), 2 * this.#drawnInMs);
  }

  #drawDirty() {
    const began = performance.now();
    const wasAtEnd = this.#isAtEnd();
    for (const id of this.#dirty) this.#views.get(id)?.draw();
    this.#dirty.clear();
    if (wasAtEnd) this.#toEnd();
    this.#drawnInMs = performance.now() - began;
  }

  #isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR_END_PX;
  }

  #toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  #showJump() {
    $("jump").hidden = this.#isAtEnd();
  }
}

const VIEWS = { user: () => UserView, tool: () => ToolView, assistant: () => AnswerView };
const viewOf = (thread, message) => new (VIEWS[message.role]())(thread, message);

/** A message in the log. */
class View {
  constructor(thread, message, label) {
    this.thread = thread;
    this.message = message;
    this.node = element("article", { class: `message ${message.role}`, "aria-label": label });
  }

  /** Buttons to the branches beside this message's, where there are any. */
  branchButtons() {
    const { conversation } = this.thread;
    const all = conversations.alternatives(conversation, this.message);
    if (all.length < 2) return [];
    const at = all.indexOf(this.message);
    const show = (index) => () => conversations.showBranch(conversation, all[index]);
    return [
      element("span", { class: "branches" },
        iconButton("left", "Previous version", show(at - 1), { disabled: at === 0 }),
        element("span", {}, `${at + 1} / ${all.length}`),
        iconButton("right", "Next version", show(at + 1), { disabled: at === all.length - 1 })),
    ];
  }
}

class UserView extends View {
  #isEditing = false;

  constructor(thread, message) {
    super(thread, message, "You");
  }

  draw() {
    if (this.#isEditing) return;
    const { content, files = [] } = this.message;
    const { conversation } = this.thread;
    const actions = element("div", { class: "meta" }, ...this.branchButtons(),
      iconButton("edit", "Edit", () => this.#edit(), { disabled: isAnswering(conversation) }), copyButton(() => content));
    this.node.replaceChildren(
      ...files.map(({ name, text }) => element("details", { class: "file" }, element("summary", {}, name), element("pre", { tabindex: "0" }, text))),
      element("div", { class: "said" }, content ? element("div", { class: "body" }, content) : null, actions));
  }

  /** Put a field in the message's place; what it is sent as becomes a branch of its own. */
  #edit() {
    this.#isEditing = true;
    const { conversation } = this.thread;
    const area = element("textarea", { "aria-label": "Edit your message", rows: "3" });
    area.value = this.message.content;
    const end = () => {
      this.#isEditing = false;
      this.draw();
    };
    const send = () => {
      if (!area.value.trim() || isAnswering(conversation)) return;
      end();
      const [parent] = conversations.branchTo(conversation, this.message).slice(-2, -1);
      const { files } = this.message;
      answer(conversation, conversations.add(conversation, parent ?? null, { role: "user", content: area.value, files }));
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
      if (event.key === "Escape") { event.stopPropagation(); end(); }
    });
    const buttons = element("div", { class: "row" }, element("button", { type: "button", onclick: end }, "Cancel"),
      element("button", { type: "button", class: "primary", onclick: send }, "Send"));
    this.node.replaceChildren(element("div", { class: "editor" }, area, buttons));
    area.focus();
  }
}

class ToolView extends View {
  constructor(thread, message) {
    super(thread, message, "Result of a tool");
  }

  draw() {
    const { name, content } = this.message;
    this.node.replaceChildren(element("details", { class: "file" }, element("summary", {}, `Result of ${name}`), element("pre", { tabindex: "0" }, content)));
  }
}

class AnswerView extends View {
  #body = element("div", { class: "body" });
  #text = new MarkdownView(this.#body);
  #cursor = element("span", { class: "cursor" });
  #reasoning = null;
  #calls = element("div", { class: "calls" });
  #results = null;
  #meta = element("div", { class: "meta" });
  #drawnMeta = null;
  #wasWritten = false;

  constructor(thread, message) {
    super(thread, message, "Answer");
    this.node.append(this.#body, this.#calls, this.#meta);
  }

  draw() {
    const { message } = this;
    const isWritten = conversations.isWritten(message);
    this.#drawReasoning(isWritten);
    this.#cursor.remove();
    this.#text.show(message.content);
    if (isWritten && !message.calls) lastLine(this.#body).append(this.#cursor);
    this.#drawCalls(isWritten);
    this.#drawMeta(isWritten);
  }

  #drawReasoning(isWritten) {
    const { reasoning, content, stats } = this.message;
    if (!reasoning) {
      this.#reasoning?.node.remove();
      this.#reasoning = null;
      return;
    }
    if (!this.#reasoning) {
      const [summary, text] = [element("summary"), element("div", { class: "body" })];
      this.#reasoning = { summary, text: new MarkdownView(text), node: element("details", { class: "reasoning" }, summary, text) };
      this.node.prepend(this.#reasoning.node);
    }
    const isThinking = isWritten && !content;
    this.#reasoning.node.classList.toggle("busy", isThinking);
    this.#reasoning.summary.textContent = isThinking ? "Thinking…" : stats?.thoughtS ? `Thought for ${stats.thoughtS.toFixed(1)} s` : "Reasoning";
    this.#reasoning.text.show(reasoning);
  }

  #drawCalls(isWritten) {
    const { calls = [] } = this.message;
    if (this.#calls.children.length !== calls.length) {
      this.#calls.replaceChildren(...calls.map(({ name }) =>
        element("details", { class: "call" }, element("summary", {}, "Called ", element("code", {}, name)), element("pre", { tabindex: "0" }))));
    }
    calls.forEach((call, index) => { this.#calls.children[index].querySelector("pre").textContent = indented(call.arguments); });
    const isOpen = calls.length > 0 && !isWritten && this.thread.isLast(this.message);
    if (isOpen && !this.#results) this.#calls.after((this.#results = this.#resultForm(calls)));
    if (!isOpen) {
      this.#results?.remove();
      this.#results = null;
    }
  }

  /** Where the reader says what the tools found, since the page runs none. */
  #resultForm(calls) {
    const { conversation } = this.thread;
    const areas = calls.map(() => element("textarea", { rows: "2", required: true }));
    const send = (event) => {
      event.preventDefault();
      let last = this.message;
      calls.forEach(({ id, name }, index) => {
        last = conversations.add(conversation, last, { role: "tool", name, callId: id, content: areas[index].value });
      });
      answer(conversation, last);
    };
    return element("form", { class: "results", onsubmit: send },
      ...calls.map(({ name }, index) => element("label", {}, `What ${name} returns`, areas[index])),
      element("div", { class: "row" }, element("button", { class: "primary" }, calls.length > 1 ? "Send the results" : "Send the result")));
  }

  /** What stands below an answer; drawn anew only when it changes, so that a button keeps the focus. */
  #drawMeta(isWritten) {
    const { message, thread } = this;
    const isLast = thread.isLast(message);
    const isCut = message.state === "writing" && !isWritten;
    const numAlternatives = conversations.alternatives(thread.conversation, message).length;
    const state = JSON.stringify([isWritten, isLast, isCut, message.fault, message.stats, message.state, numAlternatives, isAnswering(thread.conversation)]);
    if (state === this.#drawnMeta) return;
    this.#drawnMeta = state;
    const fault = isCut ? "Cut short: the page was closed or reloaded." : message.fault;
    const stats = statsText(message);
    const canGoOn = isLast && !message.calls && (isCut || ["stopped", "failed"].includes(message.state) || message.finish === "length");
    this.#meta.replaceChildren(...(isWritten ? [] : [
      ...(fault ? [element("span", { class: "fault", role: "alert" }, fault)] : []),
      ...(canGoOn ? [element("button", { type: "button", class: "go-on", onclick: () => this.#goOn() }, message.content ? "Continue" : "Try again")] : []),
      ...this.branchButtons(),
      ...(message.content ? [copyButton(() => message.content)] : []),
      ...(isLast ? [iconButton("retry", "Retry", () => this.#retry())] : []),
      ...(stats ? [element("span", { class: "stats" }, stats)] : []),
    ]));
    if (this.#wasWritten && !isWritten) say(fault ?? message.content);
    this.#wasWritten = isWritten;
  }

  #goOn() {
    goOn(this.thread.conversation, this.message);
    this.draw();
  }

  #retry() {
    const { conversation } = this.thread;
    const [parent] = conversations.branchTo(conversation, this.message).slice(-2, -1);
    answer(conversation, parent);
  }
}

/** The node that holds the last line of a text, where a cursor belongs. */
function lastLine(body) {
  let node = body;
  for (let last = node; last && FOLLOWED.has(last.tagName); last = last.lastElementChild) {
    node = last;
    if (last.lastChild?.nodeType === Node.TEXT_NODE && last.lastChild.textContent.trim()) break;
  }
  return node;
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not complete yet
  }
}

function statsText({ stats, state, finish, model }) {
  const parts = [];
  if (stats) {
    parts.push(`${stats.firstTokenS.toFixed(2)} s to the first token`);
    if (stats.tokensPerS) parts.push(`${stats.tokensPerS.toFixed(0)} tokens/s`);
    if (stats.numTokens) parts.push(`${stats.numTokens} tokens`);
  }
  if (state === "stopped") parts.push("stopped");
  if (finish === "length") parts.push("cut at the limit");
  if (!parts.length && model) parts.push(model);
  return parts.join(" · ");
}
