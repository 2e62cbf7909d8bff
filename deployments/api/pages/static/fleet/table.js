/* A table that sorts by any of its columns, and shows a bounded number of those rows that hold the words of a filter. */

import { count, element, exact } from "./format.js";

const STEP = 50;
const FEW = 10;
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

/**
 * Draws rows, each any value that its columns know how to read.
 *
 * `columns` are `{ name, value, write, isText }`: `value(row)` is what they sort by, a number or, where `isText`, a text;
 * `write(row)` is what stands in the cell, a text or an element; without it, the value. The first one names the row. `by`
 * is the index of the column that sorts at first, `text(row)` what the filter looks through, and `noun` one row's and
 * several rows' name.
 */
export class Table {
  #columns;
  #text;
  #noun;
  #rows = [];
  #words = "";
  #most = STEP;
  #by;
  #isRising = false;
  #tools = element("div", "tools");
  #filter = element("input");
  #body = element("tbody");
  #heads;
  #note = element("span", "note");
  #more = element("button", "", `Show ${STEP} more`);
  #drawn = "";

  constructor(target, { caption, columns, by, text, noun }) {
    this.#columns = columns;
    this.#by = by;
    this.#text = text;
    this.#noun = noun;
    this.#heads = columns.map((column, index) => this.#makeHead(column, index));
    const scroll = element("div", "scroll", element("table", "", element("thead", "", element("tr", "", ...this.#heads)), this.#body));
    scroll.tabIndex = 0; // where the window is narrow, the arrow keys move it
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", caption);
    this.#filter.type = "search";
    this.#filter.placeholder = "Filter";
    this.#filter.setAttribute("aria-label", `Filter: ${caption}`);
    this.#filter.addEventListener("input", () => {
      this.#words = this.#filter.value.trim().toLowerCase();
      this.#most = STEP;
      this.#draw();
    });
    this.#more.type = "button";
    this.#more.addEventListener("click", () => {
      this.#most += STEP;
      this.#draw();
    });
    this.#note.setAttribute("role", "status");
    this.#tools.append(this.#filter, this.#note);
    target.replaceChildren(element("h3", "", caption), this.#tools, scroll, this.#more);
  }

  /** Show these rows from now on; sorting, filter and place stay as they are. */
  show(rows) {
    this.#rows = rows;
    this.#draw();
  }

  #makeHead({ name, isText }, index) {
    const button = element("button", "", name);
    button.type = "button";
    button.addEventListener("click", () => {
      // Numbers begin with the largest, texts with the first of the alphabet.
      this.#isRising = this.#by === index ? !this.#isRising : Boolean(isText);
      this.#by = index;
      this.#draw();
    });
    const head = element("th", isText ? "text" : "", button);
    head.scope = "col";
    return head;
  }

  #draw() {
    const words = this.#words.split(/\s+/);
    const found = this.#rows.filter((row) => {
      const text = this.#text(row).toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const { value, isText } = this.#columns[this.#by], compare = isText ? collator.compare : (a, b) => (a === b ? 0 : a - b);
    found.sort((a, b) => (this.#isRising ? 1 : -1) * compare(value(a), value(b)));
    const shown = found.slice(0, this.#most);
    this.#tools.hidden = this.#rows.length <= FEW;
    this.#note.textContent = shown.length < found.length ? `${exact(shown.length)} of ${count(found.length, ...this.#noun)}` : count(found.length, ...this.#noun);
    this.#more.hidden = shown.length === found.length;
    const state = JSON.stringify([shown, this.#by, this.#isRising]);
    if (state === this.#drawn) return;
    this.#drawn = state;
    this.#heads.forEach((head, index) => {
      if (index === this.#by) head.setAttribute("aria-sort", this.#isRising ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    this.#body.replaceChildren(...shown.map((row) => this.#makeRow(row)));
  }

  #makeRow(row) {
    const cells = this.#columns.map(({ value, write = value, isText }, index) => {
      const cell = element(index ? "td" : "th", isText ? "text" : "", write(row));
      if (!index) cell.scope = "row";
      return cell;
    });
    return element("tr", "", ...cells);
  }
}
