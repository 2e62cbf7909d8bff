/* The libraries, from this server: exact versions, whose files ../vendor/manifest.json lists. Those for code and maths are
   large and come when an answer first needs them. */

import { Marked } from "../vendor/marked-18.2.1/marked.esm.js";
import "../vendor/dompurify-3.5.0/purify.min.js"; // a script of the older kind, which leaves a global name

const { DOMPurify } = globalThis;
export { DOMPurify, Marked };

let highlighting = null;
export function loadHighlighter() {
  highlighting ??= import("../vendor/highlight-11.12.0/highlight.min.js").then((module) => module.default);
  return highlighting;
}

let typesetting = null;
export function loadTypesetter() {
  typesetting ??= import("../vendor/katex-0.19.1/katex.min.js").then(() => globalThis.katex);
  return typesetting;
}
