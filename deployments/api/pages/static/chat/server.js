/* What the page asks of its server, whose address is the page's own: every path is relative, since a server may be behind
   a prefix. */

import { recall } from "./dom.js";

/** What the server refused, or that it could not be reached, in words for the reader. */
class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const key = recallKey();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

/** The API key, which is kept in this tab alone, as it is. */
export function recallKey() {
  try {
    return sessionStorage.getItem("rayline.key") ?? "";
  } catch {
    return "";
  }
}

export function keepKey(key) {
  try {
    if (key) sessionStorage.setItem("rayline.key", key);
    else sessionStorage.removeItem("rayline.key");
  } catch {
    /* the browser keeps nothing */
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { headers: headers(), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.", 0);
  }
  if (!response.ok) throw new ServerError(await faultOf(response), response.status);
  return response;
}

async function faultOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

/** The names of the models that are served. */
export async function models() {
  return (await (await ask("v1/models")).json()).data.map(({ id }) => id);
}

/** What the key has used and has left, as `/v1/usage` says. */
export async function usage() {
  return (await ask("v1/usage")).json();
}

/** The chunks of an answer as they come, as OpenAI's API gives them. */
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new ServerError("The connection to the server was lost.", 0);
}

/** The data of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

/* ---- Which model ---- */

/** The models that are served and the one that answers; null until the server has said. */
export const served = { names: [], chosen: null };

/** Ask which models there are; the one that was chosen last stays chosen while it is served. */
export async function learnModels() {
  served.names = await models();
  const last = recall("localStorage", "rayline.model", null);
  served.chosen = served.names.includes(last) ? last : served.names[0];
}
