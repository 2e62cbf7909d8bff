/* Where messages are written: the field, files of text beside it, and the button that sends or stops. */

import { $, element, iconButton, keep, notify, recall } from "./dom.js";

const MAX_FILE_BYTES = 1_000_000;

/** Calls `onsend({ content, files })`, and `onstop()` while `isAnswering()`. */
export class Composer {
  #files = [];
  #draftOf = null;

  constructor({ onsend, onstop, isAnswering }) {
    Object.assign(this, { onsend, onstop, isAnswering });
    const field = $("text");
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      if (isAnswering()) onstop();
      else this.#send();
    });
    field.addEventListener("input", () => this.#changed());
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!isAnswering()) this.#send();
    });
    field.addEventListener("paste", (event) => this.#takeFiles(event, event.clipboardData.files));
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => this.#takeFiles(event, event.dataTransfer.files));
    $("attach").addEventListener("click", () => $("files").click());
    $("files").addEventListener("change", () => {
      this.attach([...$("files").files]);
      $("files").value = "";
    });
  }

  /** Show what was begun in a conversation and not sent. */
  open(conversationId) {
    this.#draftOf = `rayline.draft.${conversationId}`;
    $("text").value = recall("sessionStorage", this.#draftOf, "");
    this.#files = [];
    this.#drawFiles();
    this.#grow();
    this.draw();
    this.focus();
  }

  /** Not where that would open a keyboard over half of the screen. */
  focus() {
    if (matchMedia("(pointer: fine)").matches) $("text").focus();
  }

  /** The button as it is while an answer is made, or else. */
  draw() {
    const isAnswering = this.isAnswering();
    $("send").classList.toggle("stop", isAnswering);
    $("send").setAttribute("aria-label", isAnswering ? "Stop" : "Send");
    $("send").title = isAnswering ? "Stop (Esc)" : "Send (Enter)";
    $("send").disabled = !isAnswering && !$("text").value.trim() && !this.#files.length;
  }

  /** Attach files that hold text; the others are named in a notice. */
  async attach(files) {
    for (const file of files) {
      try {
        if (file.size > MAX_FILE_BYTES) throw new Error("larger than 1 MB");
        const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
        if (text.includes("\0")) throw new Error("not a text");
        this.#files.push({ name: file.name, text });
      } catch (error) {
        notify(`${file.name} cannot be attached: ${error instanceof TypeError ? "not a text" : error.message}`);
      }
    }
    this.#drawFiles();
    this.draw();
    this.focus();
  }

  #takeFiles(event, files) {
    if (!files.length) return;
    event.preventDefault();
    this.attach([...files]);
  }

  #drawFiles() {
    $("attached").replaceChildren(
      ...this.#files.map((file) =>
        element(
          "li",
          {},
          element("span", {}, file.name),
          iconButton("close", `Remove ${file.name}`, () => {
            this.#files = this.#files.filter((other) => other !== file);
            this.#drawFiles();
            this.draw();
          }),
        ),
      ),
    );
  }

  #send() {
    const content = $("text").value;
    const files = this.#files;
    if (!content.trim() && !files.length) return;
    $("text").value = "";
    this.#files = [];
    this.#drawFiles();
    this.#changed();
    this.onsend({ content, ...(files.length ? { files } : {}) });
  }

  #changed() {
    keep("sessionStorage", this.#draftOf, $("text").value || undefined);
    this.#grow();
    this.draw();
  }

  #grow() {
    const field = $("text");
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight}px`;
  }
}
