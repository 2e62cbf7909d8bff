/* Conversations and their messages in IndexedDB: each a record of its own, so that tabs do not overwrite each other's.
   Where the browser keeps nothing, everything lasts as long as the page. */

const CONVERSATIONS = "conversations";
const MESSAGES = "messages";
const OF_CONVERSATION = "conversationId";

const finished = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const committed = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });

class Database {
  constructor(database) {
    this.database = database;
  }

  static async open() {
    const request = indexedDB.open("rayline", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
      request.result.createObjectStore(MESSAGES, { keyPath: "id" }).createIndex(OF_CONVERSATION, OF_CONVERSATION);
    };
    return new Database(await finished(request));
  }

  #read(store) {
    return this.database.transaction(store).objectStore(store);
  }

  conversations() {
    return finished(this.#read(CONVERSATIONS).getAll());
  }

  conversation(id) {
    return finished(this.#read(CONVERSATIONS).get(id));
  }

  messagesOf(conversationId) {
    return finished(this.#read(MESSAGES).index(OF_CONVERSATION).getAll(conversationId));
  }

  allMessages() {
    return finished(this.#read(MESSAGES).getAll());
  }

  /** Write a conversation and some of its messages, all or none. */
  save(conversation, messages) {
    const transaction = this.database.transaction([CONVERSATIONS, MESSAGES], "readwrite");
    transaction.objectStore(CONVERSATIONS).put(conversation);
    for (const message of messages) transaction.objectStore(MESSAGES).put(message);
    return committed(transaction);
  }

  /** Take out a conversation with all its messages. */
  async remove(conversationId) {
    const transaction = this.database.transaction([CONVERSATIONS, MESSAGES], "readwrite");
    transaction.objectStore(CONVERSATIONS).delete(conversationId);
    const messages = transaction.objectStore(MESSAGES);
    for (const key of await finished(messages.index(OF_CONVERSATION).getAllKeys(conversationId))) messages.delete(key);
    return committed(transaction);
  }
}

/** The same for as long as the page lives. */
class Memory {
  #conversations = new Map();
  #messages = new Map();

  async conversations() {
    return [...this.#conversations.values()];
  }

  async conversation(id) {
    return this.#conversations.get(id);
  }

  async messagesOf(conversationId) {
    return (await this.allMessages()).filter((message) => message.conversationId === conversationId);
  }

  async allMessages() {
    return [...this.#messages.values()];
  }

  async save(conversation, messages) {
    this.#conversations.set(conversation.id, structuredClone(conversation));
    for (const message of messages) this.#messages.set(message.id, structuredClone(message));
  }

  async remove(conversationId) {
    this.#conversations.delete(conversationId);
    for (const message of await this.messagesOf(conversationId)) this.#messages.delete(message.id);
  }
}

export const database = await Database.open().catch(() => new Memory());
