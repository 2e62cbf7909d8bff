/* The conversations of this browser, and what other tabs do to them.

   A conversation is a tree of messages: editing a message or asking for another answer adds a branch beside the old one.
   Messages are only ever added, and each is written by the one tab that made it, so two tabs may go on with the same
   conversation and lose nothing. Of the conversation's own record (title, and which branch is shown) the last writer's
   counts. */

import { database } from "./database.js";
import { keep, newId, recall } from "./dom.js";

export const NEW_TITLE = "New conversation";
const MAX_TITLE_LENGTH = 60;

/** Tells what changed, as events: "list"; "conversation" and "deleted" with its id; "message" with the message; "unsaved"
    with what the browser says when it cannot keep more. */
export const changes = new EventTarget();
const tell = (kind, detail) => changes.dispatchEvent(new CustomEvent(kind, { detail }));

const conversations = new Map();
const messages = new Map(); // by conversation, those that have been read: a map of messages by id
const channel = new BroadcastChannel("rayline.chat");

/** Conversations, the latest first. */
export const list = () => [...conversations.values()].sort((a, b) => b.changedAt - a.changedAt);

export const find = (id) => conversations.get(id);

/** Read all conversations, not yet their messages. */
export async function begin() {
  for (const conversation of await database.conversations()) conversations.set(conversation.id, conversation);
  await adoptOlder();
  channel.postMessage({ kind: "who answers" });
}

/** A conversation that is kept once it has a message. */
export function create() {
  const now = Date.now();
  return { id: newId(), title: NEW_TITLE, createdAt: now, changedAt: now, leafId: null };
}

/** Read a conversation's messages, once. */
export async function load(conversation) {
  if (messages.has(conversation.id)) return;
  const found = await database.messagesOf(conversation.id);
  if (!messages.has(conversation.id)) messages.set(conversation.id, byId(found));
}

const byId = (found) => new Map(found.map((message) => [message.id, message]));
const messagesOf = (conversation) => messages.get(conversation.id) ?? new Map();

/** The branch that is shown, from the first message to the last. */
export function branch(conversation) {
  const known = messagesOf(conversation);
  const found = [];
  for (let message = known.get(conversation.leafId); message; message = known.get(message.parentId))
    found.unshift(message);
  return found;
}

/** The branch as far as a message, which is its last. */
export function branchTo(conversation, message) {
  return branch({ ...conversation, leafId: message.id });
}

/** A message and those in its place on other branches, the oldest first. */
export function alternatives(conversation, message) {
  const all = [...messagesOf(conversation).values()];
  return all.filter(({ parentId, role }) => parentId === message.parentId && role === message.role).sort(byTime);
}

const byTime = (a, b) => a.createdAt - b.createdAt;

/** Show the branch through a message, with the latest of what came after it. */
export function showBranch(conversation, message) {
  const all = [...messagesOf(conversation).values()].sort(byTime);
  let last = message;
  for (let next = last; next; next = all.findLast(({ parentId }) => parentId === last.id)) last = next;
  conversation.leafId = last.id;
  tell("conversation", conversation.id);
  return save(conversation, []);
}

/** Add a message behind another one (null for the first) and show its branch. */
export function add(conversation, parent, fields) {
  const message = {
    id: newId(),
    conversationId: conversation.id,
    parentId: parent?.id ?? null,
    createdAt: Date.now(),
    ...fields,
  };
  if (!messages.has(conversation.id)) messages.set(conversation.id, new Map());
  messagesOf(conversation).set(message.id, message);
  if (!conversations.has(conversation.id)) conversations.set(conversation.id, conversation);
  if (conversation.title === NEW_TITLE && message.role === "user") conversation.title = titleOf(message);
  conversation.leafId = message.id;
  conversation.changedAt = message.createdAt;
  tell("list");
  tell("conversation", conversation.id);
  save(conversation, [message]);
  return message;
}

const titleOf = ({ content, files }) =>
  (content.trim() || files?.[0]?.name || NEW_TITLE).replace(/\s+/g, " ").slice(0, MAX_TITLE_LENGTH);

export function rename(conversation, title) {
  conversation.title = title.trim() || conversation.title;
  tell("list");
  tell("conversation", conversation.id);
  return save(conversation, []);
}

/** Tell whatever draws a message that it has changed. */
export function changed(message) {
  tell("message", message);
}

/** Write a conversation's record and some of its messages, and tell the other tabs. */
export async function save(conversation, ofThese) {
  if (!conversations.has(conversation.id)) return; // deleted meanwhile
  try {
    await database.save(conversation, ofThese);
  } catch (error) {
    tell("unsaved", error);
    return;
  }
  channel.postMessage({ kind: "saved", id: conversation.id });
}

/** Take a conversation away. Returns what brings it back. */
export async function remove(conversation) {
  await load(conversation);
  const kept = [...messagesOf(conversation).values()];
  forget(conversation.id);
  await database.remove(conversation.id);
  channel.postMessage({ kind: "deleted", id: conversation.id });
  return () => restore(conversation, kept);
}

/** Put a conversation with all its messages among the others. */
export async function restore(conversation, itsMessages) {
  conversations.set(conversation.id, conversation);
  messages.set(conversation.id, byId(itsMessages));
  tell("list");
  await save(conversation, itsMessages);
}

function forget(id) {
  tell("deleted", id);
  conversations.delete(id);
  messages.delete(id);
  tell("list");
}

/** Every message of a conversation. */
export async function everyMessage(conversation) {
  await load(conversation);
  return [...messagesOf(conversation).values()].sort(byTime);
}

/** Conversations whose title or text holds the words, the latest first, each with a piece of where it does. */
export async function search(words) {
  const wanted = words.toLowerCase();
  const pieces = new Map();
  for (const { conversationId, content } of await database.allMessages()) {
    const at = content.toLowerCase().indexOf(wanted);
    if (at >= 0 && !pieces.has(conversationId))
      pieces.set(conversationId, content.slice(Math.max(0, at - 20), at + 60));
  }
  return list()
    .filter(({ id, title }) => pieces.has(id) || title.toLowerCase().includes(wanted))
    .map((conversation) => ({ conversation, piece: pieces.get(conversation.id) }));
}

/* ---- Other tabs ---- */

const elsewhere = new Set(); // messages that another tab is writing
const here = new Set(); // messages that this tab is writing

/** Whether a message is being written: by this tab, or by another one. A message that nobody writes was cut short. */
export const isWritten = (message) => here.has(message.id) || elsewhere.has(message.id);

/** Say whether this tab writes a message. */
export function setWriting(message, isWriting) {
  if (isWriting) here.add(message.id);
  else here.delete(message.id);
  channel.postMessage({ kind: isWriting ? "writing" : "left", ids: [message.id] });
  tell("list");
}

/** Whether an answer in this conversation is being written. */
export const isBusy = (conversation) => [...messagesOf(conversation).values()].some(isWritten);

channel.onmessage = async ({ data: { kind, id, ids } }) => {
  if (kind === "saved") await reload(id);
  else if (kind === "deleted") forget(id);
  else if (kind === "who answers" && here.size) channel.postMessage({ kind: "writing", ids: [...here] });
  else if (kind === "writing" || kind === "left") {
    for (const one of ids) elsewhere[kind === "writing" ? "add" : "delete"](one);
    tell("list");
    for (const conversationId of messages.keys()) tell("conversation", conversationId);
  }
};
addEventListener("pagehide", () => channel.postMessage({ kind: "left", ids: [...here] }));

/** Take over what another tab saved, but for the messages that this tab writes. The branch that is shown here stays,
    and grows if the other tab went on with it. */
async function reload(id) {
  const stored = await database.conversation(id);
  if (!stored) return;
  const known = conversations.get(id);
  if (messages.has(id)) {
    const mine = messages.get(id);
    for (const message of await database.messagesOf(id)) {
      if (here.has(message.id)) continue;
      if (mine.has(message.id)) Object.assign(mine.get(message.id), message);
      else mine.set(message.id, message);
    }
  }
  if (known) {
    const isFurther = branch(stored).some((message) => message.id === known.leafId);
    Object.assign(known, stored, isFurther ? {} : { leafId: known.leafId ?? stored.leafId });
  } else conversations.set(id, stored);
  tell("list");
  tell("conversation", id);
}

/** Take over the conversations that version 0.2.0 kept, all in one place. */
async function adoptOlder() {
  const older = recall("localStorage", "rayline.talks", []);
  keep("localStorage", "rayline.talks", undefined);
  let time = Date.now();
  for (const { title, turns } of older) {
    time -= 1000;
    const adopted = turns.map(({ role, content, thought }) => ({ role, content, reasoning: thought }));
    await restore(...chained(title, adopted, time));
  }
}

/** A conversation of messages one after the other, with its messages. */
export function chained(title, turns, time = Date.now()) {
  const conversation = { ...create(), title: title || NEW_TITLE, createdAt: time, changedAt: time };
  const made = [];
  for (const turn of turns) {
    made.push({
      id: newId(),
      conversationId: conversation.id,
      parentId: made.at(-1)?.id ?? null,
      createdAt: time++,
      ...turn,
    });
  }
  conversation.leafId = made.at(-1)?.id ?? null;
  return [conversation, made];
}
