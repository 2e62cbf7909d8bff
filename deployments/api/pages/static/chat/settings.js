/* The settings dialog: what every request carries, the key, and the conversations as files. */

import { $, keep, recall } from "./dom.js";
import { keepKey, recallKey } from "./server.js";
import { drawUsage } from "./usage.js";

const TEXTS = ["system", "tools"];
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const KEY_HINT = "Kept in this tab only.";

/** What was set, by the names of the API; what was left empty is the model's affair. */
export const settings = { values: known(recall("localStorage", "rayline.settings", {})) };

function known(stored) {
  const texts = TEXTS.filter((name) => stored[name]).map((name) => [name, stored[name]]);
  const numbers = NUMBERS.filter((name) => ![undefined, ""].includes(stored[name])).map((name) => [
    name,
    Number(stored[name]),
  ]);
  return Object.fromEntries([...texts, ...numbers]);
}

/** Show the dialog, with a hint at the key where it is what is missing. */
export function openSettings(hint = KEY_HINT) {
  for (const name of [...TEXTS, ...NUMBERS]) $(name).value = settings.values[name] ?? "";
  $("key").value = recallKey();
  $("key-hint").textContent = hint;
  if (!$("settings").open) $("settings").showModal();
  drawUsage();
  if (hint !== KEY_HINT) $("key").focus();
}

/** Call `onsaved` whenever settings were saved here; those that another tab saves are taken over. */
export function begin(onsaved) {
  addEventListener("storage", ({ key }) => {
    if (key === "rayline.settings") settings.values = known(recall("localStorage", "rayline.settings", {}));
  });
  $("tune").addEventListener("click", () => openSettings());
  $("tools").addEventListener("input", () => $("tools").setCustomValidity(faultOfTools($("tools").value)));
  $("cancel").addEventListener("click", () => $("settings").close());
  $("settings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    settings.values = known(Object.fromEntries([...TEXTS, ...NUMBERS].map((name) => [name, $(name).value.trim()])));
    keep("localStorage", "rayline.settings", settings.values);
    keepKey($("key").value.trim());
    $("settings").close();
    onsaved();
  });
}

/** What is wrong with a list of tools; "" for nothing. */
function faultOfTools(text) {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : "Tools are a JSON array.";
  } catch (error) {
    return `This is not JSON: ${error.message}`;
  }
}
