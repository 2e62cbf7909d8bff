/* Messages as they are shown: the reader's own, and what tools returned. */

import { answer, stop } from "./answers.js";
import * as conversations from "./conversations.js";
import { copyButton, element, iconButton } from "./dom.js";

/** A message in the log. */
export class View {
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
      element(
        "span",
        { class: "branches" },
        iconButton("left", "Previous version", show(at - 1), { disabled: at === 0 }),
        element("span", {}, `${at + 1} / ${all.length}`),
        iconButton("right", "Next version", show(at + 1), { disabled: at === all.length - 1 }),
      ),
    ];
  }
}

export class UserView extends View {
  #isEditing = false;
  #drawn = null;

  constructor(thread, message) {
    super(thread, message, "You");
  }

  /** Draw it, but not anew when nothing has changed, so that what is open or has the focus stays so. */
  draw() {
    const { content, files = [] } = this.message;
    const { conversation } = this.thread;
    const isUnanswered = this.thread.isLast(this.message);
    const state = JSON.stringify([isUnanswered, conversations.alternatives(conversation, this.message).length]);
    if (this.#isEditing || state === this.#drawn) return;
    this.#drawn = state;
    const getAnswer = () => answer(conversation, this.message);
    const actions = element(
      "div",
      { class: "meta" },
      ...this.branchButtons(),
      isUnanswered && element("button", { type: "button", class: "go-on", onclick: getAnswer }, "Get an answer"),
      iconButton("edit", "Edit", () => this.#edit()),
      copyButton(() => content),
    );
    this.node.replaceChildren(
      ...files.map(({ name, text }) =>
        element("details", { class: "file" }, element("summary", {}, name), element("pre", { tabindex: "0" }, text)),
      ),
      element("div", { class: "said" }, content ? element("div", { class: "body" }, content) : null, actions),
    );
  }

  /** Put a field in the message's place; what is sent from there becomes a branch of its own. */
  #edit() {
    this.#isEditing = true;
    const { conversation } = this.thread;
    const area = element("textarea", { "aria-label": "Edit your message", rows: "3" });
    area.value = this.message.content;
    const end = () => {
      this.#isEditing = false;
      this.#drawn = null;
      this.draw();
    };
    const send = () => {
      if (!area.value.trim()) return;
      end();
      stop(conversation);
      const [parent] = conversations.branchTo(conversation, this.message).slice(-2, -1);
      const { files } = this.message;
      answer(
        conversation,
        conversations.add(conversation, parent ?? null, { role: "user", content: area.value, files }),
      );
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
      if (event.key === "Escape") {
        event.stopPropagation();
        end();
      }
    });
    const buttons = element(
      "div",
      { class: "row" },
      element("button", { type: "button", onclick: end }, "Cancel"),
      element("button", { type: "button", class: "primary", onclick: send }, "Send"),
    );
    this.node.replaceChildren(element("div", { class: "editor" }, area, buttons));
    area.focus();
  }
}

export class ToolView extends View {
  constructor(thread, message) {
    super(thread, message, "Result of a tool");
    const { name, content } = message;
    this.node.append(
      element(
        "details",
        { class: "file" },
        element("summary", {}, `Result of ${name}`),
        element("pre", { tabindex: "0" }, content),
      ),
    );
  }

  draw() {} // it never changes
}
