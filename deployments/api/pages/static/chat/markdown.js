/* Markdown to nodes. HTML in an answer is shown as it was written, and whatever could run is taken out besides. */

import { copyButton, element } from "./dom.js";
import { DOMPurify, Marked, loadHighlighter } from "./libraries.js";
import { MATH_RULES, typeset } from "./mathematics.js";

const MAX_HIGHLIGHTED_CHARS = 50_000;
const HARMLESS = /^<\/?(?:br|sub|sup|u|mark)\s*\/?>$/i;
const ADDRESS = /^(?:https?:\/\/|mailto:)/i;
const CLEAN = {
  ALLOWED_TAGS:
    "a blockquote br code del em h3 h4 h5 h6 hr input li mark ol p pre span strong sub sup table tbody td th thead tr u ul".split(
      " ",
    ),
  ALLOWED_ATTR: ["align", "checked", "class", "disabled", "href", "rel", "start", "target", "title", "type"],
  ADD_URI_SAFE_ATTR: ["align", "rel", "start", "target", "type"], // what is no address is not held to look like one
  ALLOWED_URI_REGEXP: ADDRESS,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = (text) =>
  text.replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);
const link = (href, html) =>
  ADDRESS.test(href) ? `<a href="${escaped(href)}" target="_blank" rel="noopener noreferrer">${html}</a>` : html;

const marked = new Marked({
  gfm: true,
  breaks: true,
  extensions: MATH_RULES,
  renderer: {
    html: ({ raw, block }) =>
      HARMLESS.test(raw.trim()) ? raw : block ? `<p>${escaped(raw.trim())}</p>` : escaped(raw),
    // An answer stands below the headings of the page.
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    link({ href, tokens }) {
      return link(href, this.parser.parseInline(tokens));
    },
    // Pictures would come from other servers, which the page asks for nothing.
    image: ({ href, text }) => link(href, escaped(text || href)),
  },
});

const DEFINITION = /^ {0,3}\[[^\]]+\]:/m; // of a link, which may change any block
const NUM_UNSETTLED = 3; // blocks at the end, which more text may change

/** A text as Markdown in a node, which may grow: blocks that have not changed are left alone, with what is selected in
    them, and only the last ones are read again. */
export class MarkdownView {
  #text = "";
  #blocks = []; // the source and the nodes of each

  constructor(node) {
    this.node = node;
  }

  show(given) {
    const text = given.replace(/\r\n?/g, "\n");
    const isGrown = text.startsWith(this.#text) && !DEFINITION.test(text);
    let numSame = isGrown ? Math.max(0, this.#blocks.length - NUM_UNSETTLED) : 0;
    const numChars = this.#blocks.slice(0, numSame).reduce((sum, { raw }) => sum + raw.length, 0);
    const tokens = marked.lexer(text.slice(numChars));
    while (tokens.length && !DEFINITION.test(text) && this.#blocks[numSame]?.raw === tokens[0].raw) {
      tokens.shift();
      numSame++;
    }
    for (const { nodes } of this.#blocks.splice(numSame)) for (const node of nodes) node.remove();
    for (const token of tokens) {
      const nodes = token.type === "space" ? [] : [...nodesOf(marked.parser([token]))];
      this.#blocks.push({ raw: token.raw, nodes });
      this.node.append(...nodes);
    }
    this.#text = text;
  }
}

function nodesOf(html) {
  const fragment = DOMPurify.sanitize(html, CLEAN);
  for (const pre of fragment.querySelectorAll("pre")) {
    const block = element("div", { class: "code" });
    pre.replaceWith(block);
    block.append(codeBar(pre), pre);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const scroller = element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(scroller);
    scroller.append(table);
  }
  for (const box of fragment.querySelectorAll("input")) box.setAttribute("aria-label", box.checked ? "Done" : "To do");
  typeset(fragment);
  return fragment.childNodes;
}

/** The line above a block of code, with its language and a button that copies it; the code is highlighted. */
function codeBar(pre) {
  const code = pre.querySelector("code") ?? pre;
  const language = [...code.classList].find((name) => name.startsWith("language-"))?.slice("language-".length) ?? "";
  const source = code.textContent.replace(/\n$/, "");
  code.textContent = source;
  highlight(code, source, language);
  pre.setAttribute("tabindex", "0");
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", language ? `Code: ${language}` : "Code");
  return element(
    "div",
    { class: "code-bar" },
    element("span", {}, language || "code"),
    copyButton(() => source, "Copy the code"),
  );
}

let highlighter = null; // once it has come, so that a block that grows does not flicker

async function highlight(code, source, language) {
  if (!language || source.length > MAX_HIGHLIGHTED_CHARS) return;
  highlighter ??= await loadHighlighter();
  if (!highlighter.getLanguage(language)) return;
  const { value } = highlighter.highlight(source, { language, ignoreIllegals: true });
  code.replaceChildren(
    DOMPurify.sanitize(value, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true }),
  );
}
