/* The list of conversations: search, and what can be done with each. */

import * as conversations from "./conversations.js";
import { $, element, iconButton, notify } from "./dom.js";
import { exportAs } from "./exchange.js";

const SEARCH_DELAY_MS = 150;
const isNarrow = matchMedia("(max-width: 46rem)");

/** Where the window is narrow, the list lies above the conversation while it is open. */
export function toggleSide(isOpen) {
  document.body.classList.toggle("open", isOpen && isNarrow.matches);
  $("sides").setAttribute("aria-expanded", String(isSideOpen()));
}

export const isSideOpen = () => document.body.classList.contains("open");

/** Lists conversations; `open` shows one, `current` tells which is shown. */
export class Sidebar {
  #words = "";
  #searching = 0;
  #renamed = null;
  #drawn = null;
  #menuFor = null;
  #menuButton = null;

  constructor({ open, current }) {
    this.open = open;
    this.current = current;
    conversations.changes.addEventListener("list", () => this.draw());
    $("search").addEventListener("input", () => {
      clearTimeout(this.#searching);
      this.#searching = setTimeout(() => {
        this.#words = $("search").value.trim();
        this.draw();
      }, SEARCH_DELAY_MS);
    });
    $("more").addEventListener("click", () => this.#openMenu($("more"), current()));
    $("menu-rename").addEventListener("click", () => this.#chosen(() => this.#rename()));
    $("menu-markdown").addEventListener("click", () => this.#chosen((chosen) => exportAs("md", [chosen])));
    $("menu-json").addEventListener("click", () => this.#chosen((chosen) => exportAs("json", [chosen])));
    $("menu-delete").addEventListener("click", () => this.#chosen((chosen) => this.#remove(chosen)));
  }

  /** Draw the list, but not anew when nothing in it has changed, so that no click is lost. */
  async draw() {
    const words = this.#words;
    const found = words
      ? await conversations.search(words)
      : conversations.list().map((conversation) => ({ conversation }));
    if (words !== this.#words) return; // others were typed meanwhile
    if (this.#renamed && $("conversations").querySelector("input")) return; // until the name is given
    const shown = found.map(({ conversation, piece }) => [
      conversation.id,
      conversation.title,
      piece,
      conversations.isBusy(conversation),
    ]);
    const state = JSON.stringify([shown, this.current().id, this.#renamed?.id, words]);
    if (state === this.#drawn) return;
    this.#drawn = state;
    const focused = document.activeElement?.closest("#conversations [data-id]")?.dataset.id;
    $("conversations").replaceChildren(...found.map(({ conversation, piece }) => this.#item(conversation, piece)));
    $("none-found").hidden = !words || found.length > 0;
    if (focused) $("conversations").querySelector(`[data-id="${focused}"] .open`)?.focus();
  }

  #item(conversation, piece) {
    if (this.#renamed === conversation) return element("li", {}, this.#nameField(conversation));
    const isBusy = conversations.isBusy(conversation);
    return element(
      "li",
      { "data-id": conversation.id, class: isBusy && "busy" },
      element(
        "button",
        {
          type: "button",
          class: "open",
          title: conversation.title,
          "aria-current": String(conversation.id === this.current().id),
          onclick: () => this.open(conversation),
        },
        element("span", { class: "name" }, conversation.title),
        piece && element("span", { class: "piece" }, piece),
        isBusy ? element("span", { class: "hidden" }, " (answering)") : null,
      ),
      iconButton("more", `More: ${conversation.title}`, (event) => this.#openMenu(event.currentTarget, conversation)),
    );
  }

  /* ---- The menu of a conversation ---- */

  #openMenu(button, conversation) {
    this.#menuFor = conversation;
    this.#menuButton = button;
    const menu = $("menu");
    menu.showPopover();
    const { left, right, bottom, top } = button.getBoundingClientRect();
    const fits = bottom + menu.offsetHeight + 8 < innerHeight;
    menu.style.top = `${fits ? bottom + 4 : top - menu.offsetHeight - 4}px`;
    menu.style.left = `${Math.max(8, Math.min(left, right - 40, innerWidth - menu.offsetWidth - 8))}px`;
    menu.querySelector("button").focus();
  }

  #chosen(act) {
    $("menu").hidePopover();
    this.#menuButton?.focus();
    act(this.#menuFor);
  }

  #rename() {
    this.#renamed = this.#menuFor;
    $("search").value = this.#words = "";
    toggleSide(true);
    this.draw().then(() => {
      const field = $("conversations").querySelector("input");
      field?.focus();
      field?.select();
    });
  }

  #nameField(conversation) {
    const field = element("input", { "aria-label": "New name", maxlength: "200" });
    field.value = conversation.title;
    const end = (isGiven) => {
      if (this.#renamed !== conversation) return;
      this.#renamed = null;
      if (isGiven) conversations.rename(conversation, field.value);
      else this.draw();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    field.addEventListener("blur", () => end(true));
    return field;
  }

  async #remove(conversation) {
    const wasShown = conversation.id === this.current().id;
    const restore = await conversations.remove(conversation);
    const undo = async () => {
      await restore();
      if (wasShown) this.open(conversation);
    };
    notify(`Deleted “${conversation.title}”`, { label: "Undo", run: undo });
  }
}
