/* Conversations as files: JSON with every branch, Markdown with the branch that is shown. */

import { withFiles } from "./answers.js";
import * as conversations from "./conversations.js";
import { download } from "./dom.js";

const FORMAT = "rayline-conversations";
const ROLES = new Set(["user", "assistant", "tool"]);
const MARK = /^<!-- rayline (user|assistant|tool) -->$/;
const THOUGHTS = /^<details><summary>Reasoning<\/summary>\n\n([\s\S]*?)\n\n<\/details>\n\n?/;
const HEADINGS = { user: "You", assistant: "Answer", tool: "Result of a tool" };
const FIELDS = ["content", "reasoning", "calls", "callId", "name", "files", "finish", "stats", "model", "fault"];

/** Save conversations as a file. Markdown takes one. */
export async function exportAs(kind, chosen) {
  const name =
    chosen.length === 1
      ? chosen[0].title
          .replace(/[^\p{L}\p{N}]+/gu, "-")
          .replace(/^-|-$/g, "")
          .slice(0, 60) || "conversation"
      : "conversations";
  if (kind === "json") download(`${name}.json`, await asJson(chosen), "application/json");
  else download(`${name}.md`, await asMarkdown(chosen[0]), "text/markdown");
}

async function asJson(chosen) {
  const written = [];
  for (const conversation of chosen)
    written.push({ ...conversation, messages: await conversations.everyMessage(conversation) });
  return JSON.stringify({ format: FORMAT, version: 1, conversations: written }, null, 2);
}

async function asMarkdown(conversation) {
  await conversations.load(conversation);
  const parts = conversations.branch(conversation).map(({ role, content, reasoning, calls = [], files }) => {
    const thoughts = reasoning ? `<details><summary>Reasoning</summary>\n\n${reasoning}\n\n</details>\n\n` : "";
    const called = calls.map((call) => `\n\n\`${call.name}(${call.arguments})\``).join("");
    const text = withFiles(content, files).replace(/^<!-- (\\*)rayline /gm, "<!-- \\$1rayline ");
    return `<!-- rayline ${role} -->\n## ${HEADINGS[role]}\n\n${thoughts}${text}${called}\n`;
  });
  return `# ${conversation.title}\n\n${parts.join("\n")}`;
}

/** Add the conversations of a file to those that are kept.

    Takes the JSON and the Markdown that the page exports, and JSON with a list of `messages` as the API has it. Returns the
    conversations; throws an Error that says what is wrong with the file. */
export async function importFile(file) {
  const text = await file.text();
  const read =
    text.trimStart().startsWith("{") || text.trimStart().startsWith("[") ? fromJson(text) : fromMarkdown(text);
  if (!read.length) throw new Error(`${file.name} holds no conversation`);
  for (const [conversation, messages] of read) await conversations.restore(conversation, messages);
  return read.map(([conversation]) => conversation);
}

function fromJson(text) {
  const data = JSON.parse(text);
  if (data.format === FORMAT) return data.conversations.map(withNewIds);
  const plain = Array.isArray(data) ? data : data.messages;
  if (!Array.isArray(plain)) throw new Error("This JSON holds no conversations");
  return [
    ofTurns(
      null,
      plain
        .filter(({ role, content }) => ROLES.has(role) && typeof content === "string")
        .map(({ role, content }) => ({ role, content })),
    ),
  ];
}

/** Under new ids, so that a file may be imported twice, and into the browser that it comes from. */
function withNewIds({ title, createdAt, changedAt, leafId, messages }) {
  const known = messages.filter(({ role, content }) => ROLES.has(role) && typeof content === "string");
  const [conversation] = conversations.chained(String(title ?? ""), []);
  const made = conversations.chained(
    "",
    known.map((message) => kept(message)),
  )[1];
  const ids = new Map(known.map(({ id }, index) => [id, made[index].id]));
  made.forEach((message, index) => {
    message.conversationId = conversation.id;
    message.parentId = ids.get(known[index].parentId) ?? null;
    message.createdAt = Number(known[index].createdAt) || message.createdAt;
  });
  Object.assign(conversation, {
    createdAt: Number(createdAt) || conversation.createdAt,
    changedAt: Number(changedAt) || conversation.changedAt,
  });
  conversation.leafId = ids.get(leafId) ?? made.at(-1)?.id ?? null;
  return [conversation, made];
}

function kept(message) {
  const fields = FIELDS.filter((name) => message[name] !== undefined).map((name) => [name, message[name]]);
  return {
    role: message.role,
    state: message.state === "writing" ? "stopped" : message.state,
    ...Object.fromEntries(fields),
  };
}

function fromMarkdown(text) {
  const lines = text.replace(/\r\n/g, "\n").split("\n");
  const turns = [];
  for (const [index, line] of lines.entries()) {
    const role = MARK.exec(line)?.[1];
    if (role) turns.push({ role, lines: [] });
    else if (turns.length && !MARK.test(lines[index - 1])) turns.at(-1).lines.push(line);
  }
  const title = lines[0].startsWith("# ") ? lines[0].slice(2).trim() : null;
  return turns.length ? [ofTurns(title, turns.map(turnOf))] : [];
}

function turnOf({ role, lines }) {
  const text = lines.join("\n").trim();
  const reasoning = role === "assistant" ? THOUGHTS.exec(text) : null;
  const content = text.slice(reasoning?.[0].length ?? 0).replace(/^<!-- \\(\\*)rayline /gm, "<!-- $1rayline ");
  return { role, content, ...(reasoning ? { reasoning: reasoning[1] } : {}) };
}

function ofTurns(title, turns) {
  const first = turns.find(({ role }) => role === "user")?.content ?? "";
  return conversations.chained(title ?? first.replace(/\s+/g, " ").slice(0, 60), turns);
}
