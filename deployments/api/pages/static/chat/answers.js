/* Answers while they are made. They go on whatever conversation is shown; what has come so far is kept all the time, so
   that a reload loses next to nothing. */

import * as conversations from "./conversations.js";
import { chat, learnModels, served } from "./server.js";
import { settings } from "./settings.js";

const SAVE_INTERVAL_MS = 250;
const running = new Map(); // what ends each answer, by the message's id
let isLeaving = false; // the page is closed or reloaded, which cuts its answers

addEventListener("pagehide", () => (isLeaving = true));
addEventListener("pageshow", () => (isLeaving = false));
conversations.changes.addEventListener("deleted", ({ detail: id }) => {
  for (const { conversationId, abort } of running.values()) if (conversationId === id) abort.abort();
});

/** Ask for an answer to a message. */
export function answer(conversation, parent) {
  const message = conversations.add(conversation, parent, { role: "assistant", content: "", state: "writing" });
  return write(conversation, message);
}

/** Go on with an answer where it was cut; one that had no text yet begins anew. */
export function goOn(conversation, message) {
  delete message.fault;
  delete message.finish;
  if (!message.content) delete message.reasoning;
  return write(conversation, message);
}

/** End the answers in a conversation. */
export function stop(conversation) {
  for (const { conversationId, abort } of running.values()) if (conversationId === conversation.id) abort.abort();
}

export const isAnswering = (conversation) =>
  [...running.values()].some(({ conversationId }) => conversationId === conversation.id);

async function write(conversation, message) {
  const abort = new AbortController();
  running.set(message.id, { conversationId: conversation.id, abort });
  message.state = "writing";
  conversations.setWriting(message, true);
  const saver = new Saver(conversation, message);
  const clock = new Clock();
  try {
    if (served.chosen === null) await learnModels();
    message.model = served.chosen;
    conversations.changed(message);
    for await (const chunk of chat(requestFor(conversation, message), abort.signal)) {
      take(message, chunk, clock);
      saver.saveSoon();
    }
    message.state = "done";
  } catch (error) {
    if (isLeaving) return; // what is kept is an answer that was cut short
    message.state = error.name === "AbortError" ? "stopped" : "failed";
    if (message.state === "failed") {
      message.fault = error.message;
      message.status = error.status;
    }
  }
  message.stats = clock.stats(message.stats);
  running.delete(message.id);
  conversations.setWriting(message, false);
  conversations.changed(message);
  await saver.save();
}

/** Writes a message now and then while it grows. */
class Saver {
  #timer = null;

  constructor(conversation, message) {
    this.conversation = conversation;
    this.message = message;
    this.onhide = () => this.save();
    addEventListener("pagehide", this.onhide);
  }

  saveSoon() {
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      conversations.save(this.conversation, [this.message]);
    }, SAVE_INTERVAL_MS);
  }

  save() {
    clearTimeout(this.#timer);
    removeEventListener("pagehide", this.onhide);
    return conversations.save(this.conversation, [this.message]);
  }
}

/** Measures an answer as its reader sees it. */
class Clock {
  #started = performance.now();
  #first = null;
  #last = null;
  #thoughtUntil = null;
  numTokens = 0;

  note(isThought) {
    this.#last = performance.now();
    this.#first ??= this.#last;
    if (isThought) this.#thoughtUntil = this.#last;
  }

  /** Of this answer; what was before it was cut counts among its tokens. */
  stats(before) {
    if (this.#first === null) return before;
    const seconds = (this.#last - this.#first) / 1000;
    return {
      firstTokenS: (this.#first - this.#started) / 1000,
      tokensPerS: this.numTokens > 1 && seconds > 0.05 ? (this.numTokens - 1) / seconds : null,
      numTokens: this.numTokens + (before?.numTokens ?? 0),
      thoughtS: this.#thoughtUntil === null ? before?.thoughtS : (this.#thoughtUntil - this.#started) / 1000,
    };
  }
}

/** Add to a message what a chunk brings. */
function take(message, chunk, clock) {
  if (chunk.usage) clock.numTokens = chunk.usage.completion_tokens;
  const choice = chunk.choices[0];
  if (!choice) return;
  if (choice.finish_reason) message.finish = choice.finish_reason;
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
  if (!content && !reasoning && !calls) return;
  clock.note(Boolean(reasoning));
  if (content) message.content += content;
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  for (const { index, id, function: called } of calls ?? []) {
    message.calls ??= [];
    message.calls[index] ??= { id, name: called.name, arguments: "" };
    message.calls[index].arguments += called.arguments ?? "";
  }
  conversations.changed(message);
}

/** The request whose answer becomes, or goes on with, this message. */
function requestFor(conversation, message) {
  const isGoingOn = message.content !== "";
  const before = conversations.branchTo(conversation, message).slice(0, isGoingOn ? undefined : -1);
  const { system, tools, ...sampling } = settings.values;
  const messages = before.map(asSent);
  if (system) messages.unshift({ role: "system", content: system });
  return {
    model: served.chosen,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    ...sampling,
    ...(tools ? { tools: JSON.parse(tools) } : {}),
    ...(isGoingOn ? { continue_final_message: true, add_generation_prompt: false } : {}),
  };
}

function asSent({ role, content, files, calls, callId }) {
  if (role === "tool") return { role, content, tool_call_id: callId };
  if (calls?.length) {
    const toolCalls = calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
    return { role, content, tool_calls: toolCalls };
  }
  return { role, content: withFiles(content, files) };
}

/** A message's text behind the files that were attached to it, each in a fence longer than any in the file. */
export function withFiles(content, files = []) {
  const blocks = files.map(({ name, text }) => {
    const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map(([ticks]) => ticks.length));
    const fence = "`".repeat(longest + 1);
    return `${name}:\n${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
  });
  return [...blocks, content].filter(Boolean).join("\n\n");
}
