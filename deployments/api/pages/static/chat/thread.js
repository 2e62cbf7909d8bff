/* The conversation that is shown: its messages, drawn as they come and grow. */

import { AnswerView } from "./answer_view.js";
import * as conversations from "./conversations.js";
import { $ } from "./dom.js";
import { ToolView, UserView } from "./message_views.js";

const NEAR_END_PX = 80;
const VIEWS = { user: UserView, tool: ToolView, assistant: AnswerView };

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
    const views = shown.map((message) => this.#views.get(message.id) ?? new VIEWS[message.role](this, message));
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
