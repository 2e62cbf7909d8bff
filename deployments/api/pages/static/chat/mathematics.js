/* Mathematics in Markdown: \( … \) and $ … $ in a line, \[ … \] and $$ … $$ by itself. */

import { loadTypesetter } from "./libraries.js";

const BLOCK = /^ {0,3}(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/;
const DISPLAY = /^(?:\$\$([^$]+?)\$\$|\\\[([\s\S]+?)\\\])/;
// As pandoc has it: "$5 or $6" is no formula, since a space stands before the second sign.
const INLINE = /^(?:\\\(([\s\S]+?)\\\)|\$(?!\s)((?:\\.|[^$\\\n])+?)(?<!\s)\$(?![\d$]))/;

const escaped = (text) =>
  text.replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);

function rule(name, level, pattern, start, isDisplay) {
  return {
    name,
    level,
    start: (source) => source.match(start)?.index,
    tokenizer(source) {
      const match = pattern.exec(source);
      if (!match) return undefined;
      return { type: name, raw: match[0], text: (match[1] ?? match[2]).trim(), isDisplay };
    },
    renderer: ({ raw, text }) =>
      `<span class="${isDisplay ? "math display" : "math"}" title="${escaped(text)}">${escaped(raw.trim())}</span>`,
  };
}

/** What marked needs to find formulas. */
export const MATH_RULES = [
  rule("mathBlock", "block", BLOCK, /^ {0,3}(?:\$\$|\\\[)/m, true),
  rule("mathDisplay", "inline", DISPLAY, /\$\$|\\\[/, true),
  rule("mathInline", "inline", INLINE, /\$|\\\(/, false),
];

const OPTIONS = { throwOnError: true, trust: false, strict: "ignore", maxSize: 20, maxExpand: 1000 };

/** Set the formulas below a node; one that cannot be set stays as it was written. */
export async function typeset(node) {
  const formulas = [...node.querySelectorAll(".math")];
  if (!formulas.length) return;
  const typesetter = await loadTypesetter();
  for (const formula of formulas) {
    const made = document.createElement("span");
    try {
      typesetter.render(formula.title, made, { ...OPTIONS, displayMode: formula.classList.contains("display") });
    } catch {
      continue;
    } finally {
      formula.removeAttribute("title");
    }
    formula.replaceChildren(...made.childNodes);
  }
}
