/* An answer as it is shown, while it grows and after: reasoning, text, calls, and what can be done with it. */

import { answer, goOn } from "./answers.js";
import * as conversations from "./conversations.js";
import { copyButton, element, iconButton, say } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { View } from "./message_views.js";

const FOLLOWED = new Set(["P", "LI", "UL", "OL", "DIV", "PRE", "CODE", "BLOCKQUOTE", "H3", "H4", "H5", "H6"]);

export class AnswerView extends View {
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
      this.#reasoning = {
        summary,
        text: new MarkdownView(text),
        node: element("details", { class: "reasoning" }, summary, text),
      };
      this.node.prepend(this.#reasoning.node);
    }
    const isThinking = isWritten && !content;
    this.#reasoning.node.classList.toggle("busy", isThinking);
    this.#reasoning.summary.textContent = isThinking
      ? "Thinking…"
      : stats?.thoughtS
        ? `Thought for ${stats.thoughtS.toFixed(1)} s`
        : "Reasoning";
    this.#reasoning.text.show(reasoning);
  }

  #drawCalls(isWritten) {
    const { calls = [] } = this.message;
    if (this.#calls.children.length !== calls.length) {
      this.#calls.replaceChildren(
        ...calls.map(({ name }) =>
          element(
            "details",
            { class: "call" },
            element("summary", {}, "Called ", element("code", {}, name)),
            element("pre", { tabindex: "0" }),
          ),
        ),
      );
    }
    calls.forEach((call, index) => {
      this.#calls.children[index].querySelector("pre").textContent = indented(call.arguments);
    });
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
    return element(
      "form",
      { class: "results", onsubmit: send },
      ...calls.map(({ name }, index) => element("label", {}, `What ${name} returns`, areas[index])),
      element(
        "div",
        { class: "row" },
        element("button", { class: "primary" }, calls.length > 1 ? "Send the results" : "Send the result"),
      ),
    );
  }

  /** What stands below an answer; drawn anew only when it changes, so that a button keeps the focus. */
  #drawMeta(isWritten) {
    const { message, thread } = this;
    const isLast = thread.isLast(message);
    const isCut = message.state === "writing" && !isWritten;
    const numAlternatives = conversations.alternatives(thread.conversation, message).length;
    const state = JSON.stringify([
      isWritten,
      isLast,
      isCut,
      message.fault,
      message.stats,
      message.state,
      numAlternatives,
    ]);
    if (state === this.#drawnMeta) return;
    this.#drawnMeta = state;
    const fault = isCut ? "Cut short: the page was closed or reloaded." : message.fault;
    const stats = statsText(message);
    const canGoOn =
      isLast &&
      !message.calls &&
      (isCut || ["stopped", "failed"].includes(message.state) || message.finish === "length");
    this.#meta.replaceChildren(
      ...(isWritten
        ? []
        : [
            ...(fault ? [element("span", { class: "fault", role: "alert" }, fault)] : []),
            ...(canGoOn
              ? [
                  element(
                    "button",
                    { type: "button", class: "go-on", onclick: () => this.#goOn() },
                    message.content ? "Continue" : "Try again",
                  ),
                ]
              : []),
            ...this.branchButtons(),
            ...(message.content ? [copyButton(() => message.content)] : []),
            ...(isLast ? [iconButton("retry", "Retry", () => this.#retry())] : []),
            ...(stats ? [element("span", { class: "stats" }, stats)] : []),
          ]),
    );
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
