"""Responses that can be requested later: what is stored of them, within bounds, for the key that made them.

The input and the output of a response are items. A continued conversation repeats the items of its earlier responses,
so each item is stored once, for as long as any response has it. A response holds all of its input, so it can be
continued even after earlier ones have been deleted.
"""

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from deployments.api_config import ResponsesConfig
from deployments.errors import StoreAwayError
from llm.errors import ConfigError

T = TypeVar("T")

MEMORY = ":memory:"
_ROW_BYTES = 128
"""Approximate size of a row without its content."""
_BUSY_TIMEOUT_S = 5.0
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS responses (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, id TEXT NOT NULL, head BLOB NOT NULL,
    UNIQUE (owner, id));
CREATE TABLE IF NOT EXISTS items (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, id TEXT NOT NULL, digest BLOB NOT NULL,
    data BLOB NOT NULL, UNIQUE (owner, id, digest));
CREATE TABLE IF NOT EXISTS parts (
    response INTEGER NOT NULL, place INTEGER NOT NULL, item INTEGER NOT NULL, is_output INTEGER NOT NULL,
    PRIMARY KEY (response, place)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS parts_by_item ON parts (item);
CREATE TABLE IF NOT EXISTS totals (only_row INTEGER PRIMARY KEY, num_responses INTEGER, num_bytes INTEGER);
INSERT OR IGNORE INTO totals VALUES (0, 0, 0);
"""


class StoredItem(msgspec.Struct, frozen=True, array_like=True):
    """An item of a conversation.

    Attributes:
        id: the id by which it can be referred to.
        data: the whole item, in JSON.
    """

    id: str
    data: bytes


class StoredResponse(msgspec.Struct, frozen=True, array_like=True):
    """A response and all of its input.

    Attributes:
        id: the response's id.
        head: the response without its output, in JSON.
        input: its input, from the conversation's beginning.
        output: its output.
    """

    id: str
    head: bytes
    input: tuple[StoredItem, ...]
    output: tuple[StoredItem, ...]


class ResponseStore(Protocol):
    """Stores responses. No owner can find what another one stored.

    Each method raises `StoreAwayError` if the store cannot be reached.
    """

    async def put(self, owner: str, response: StoredResponse) -> bool:
        """Store a response, deleting the oldest ones to make room. False if it is larger than the whole store."""
        ...

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """The response with this id."""
        ...

    async def delete(self, owner: str, response_id: str) -> bool:
        """Delete a response; returns whether it was there."""
        ...

    async def find_items(self, owner: str, item_ids: Sequence[str]) -> dict[str, bytes]:
        """The data of the items that exist, each as last stored."""
        ...


class ResponseDatabase:
    """Responses in SQLite, in memory or in a file that several processes may share. Thread-safe.

    Args:
        path: the file; None for memory.
        max_responses: most responses, of all owners together.
        max_bytes: most bytes, of all owners together.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: str | None, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        try:
            if path is not None:
                # It holds what people have written, so nobody else may read it.
                os.close(os.open(Path(path).expanduser(), os.O_CREAT | os.O_RDWR, 0o600))
            self._database = sqlite3.connect(
                str(Path(path).expanduser()) if path is not None else MEMORY,
                timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False,
            )  # fmt: skip
            self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"responses.path {path} cannot be used: {error}") from None

    def put(self, owner: str, response: StoredResponse) -> bool:
        """See `ResponseStore`."""
        items = [(item, False) for item in response.input] + [(item, True) for item in response.output]
        least = len(response.head) + _ROW_BYTES + sum(len(item.data) + 2 * _ROW_BYTES for item, _ in items)
        if least > self._max_bytes or not self._max_responses:
            return False
        with self._transaction() as cursor:
            num_bytes = self._insert(cursor, owner, response, items)
            self._count(cursor, 1, num_bytes)
            self._make_room(cursor)
        return True

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """See `ResponseStore`."""
        with self._lock, closing(self._database.cursor()) as cursor:
            found = cursor.execute(
                "SELECT seq, head FROM responses WHERE owner = ? AND id = ?", (owner, response_id)
            ).fetchone()
            if found is None:
                return None
            rows = cursor.execute(
                "SELECT items.id, data, is_output FROM parts JOIN items ON items.seq = item WHERE response = ? "
                "ORDER BY place", (found[0],),
            ).fetchall()  # fmt: skip
        parts: tuple[list[StoredItem], list[StoredItem]] = ([], [])
        for item_id, data, is_output in rows:
            parts[is_output].append(StoredItem(item_id, data))
        return StoredResponse(response_id, found[1], tuple(parts[0]), tuple(parts[1]))

    def delete(self, owner: str, response_id: str) -> bool:
        """See `ResponseStore`."""
        with self._transaction() as cursor:
            found = cursor.execute(
                "SELECT seq FROM responses WHERE owner = ? AND id = ?", (owner, response_id)
            ).fetchone()
            if found is not None:
                self._count(cursor, -1, -self._remove(cursor, found[0]))
        return found is not None

    def find_items(self, owner: str, item_ids: Sequence[str]) -> dict[str, bytes]:
        """See `ResponseStore`."""
        found = {}
        with self._lock, closing(self._database.cursor()) as cursor:
            for item_id in item_ids:
                row = cursor.execute(
                    "SELECT data FROM items WHERE owner = ? AND id = ? ORDER BY seq DESC LIMIT 1", (owner, item_id)
                ).fetchone()
                if row is not None:
                    found[item_id] = row[0]
        return found

    def totals(self) -> tuple[int, int]:
        """Number of responses and of bytes that are stored."""
        with self._lock, closing(self._database.cursor()) as cursor:
            num_responses, num_bytes = cursor.execute("SELECT num_responses, num_bytes FROM totals").fetchone()
        return num_responses, num_bytes

    def close(self) -> None:
        """Close the file, or free the memory."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        """A change that is made completely or not at all."""
        with self._lock, closing(self._database.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")

    def _insert(
        self, cursor: sqlite3.Cursor, owner: str, response: StoredResponse, items: Sequence[tuple[StoredItem, bool]]
    ) -> int:
        """Add a response; returns how many bytes that took."""
        cursor.execute("INSERT INTO responses (owner, id, head) VALUES (?, ?, ?)", (owner, response.id, response.head))
        seq = cursor.lastrowid
        num_bytes = len(response.head) + _ROW_BYTES
        for place, (item, is_output) in enumerate(items):
            key = (owner, item.id, sha256(item.data).digest())
            cursor.execute(
                "INSERT OR IGNORE INTO items (owner, id, digest, data) VALUES (?, ?, ?, ?)", (*key, item.data)
            )
            num_bytes += _ROW_BYTES + (len(item.data) + _ROW_BYTES) * cursor.rowcount
            cursor.execute(
                "INSERT INTO parts SELECT ?, ?, seq, ? FROM items WHERE owner = ? AND id = ? AND digest = ?",
                (seq, place, is_output, *key),
            )
        return num_bytes

    def _remove(self, cursor: sqlite3.Cursor, seq: int) -> int:
        """Remove a response and the items that no other response has; returns how many bytes that freed."""
        (num_bytes,) = cursor.execute("SELECT length(head) FROM responses WHERE seq = ?", (seq,)).fetchone()
        cursor.execute("DELETE FROM responses WHERE seq = ?", (seq,))
        items = cursor.execute("SELECT item FROM parts WHERE response = ?", (seq,)).fetchall()
        cursor.execute("DELETE FROM parts WHERE response = ?", (seq,))
        num_bytes += _ROW_BYTES * (1 + len(items))
        for item in set(items):
            freed = cursor.execute(
                "DELETE FROM items WHERE seq = ? AND NOT EXISTS (SELECT 1 FROM parts WHERE item = seq) "
                "RETURNING length(data)", item,
            ).fetchall()  # fmt: skip
            num_bytes += sum(length + _ROW_BYTES for (length,) in freed)
        return int(num_bytes)

    def _make_room(self, cursor: sqlite3.Cursor) -> None:
        """Delete the oldest responses until the rest is within bounds."""
        while True:
            num_responses, num_bytes = cursor.execute("SELECT num_responses, num_bytes FROM totals").fetchone()
            if num_responses <= self._max_responses and num_bytes <= self._max_bytes:
                return
            (oldest,) = cursor.execute("SELECT MIN(seq) FROM responses").fetchone()
            self._count(cursor, -1, -self._remove(cursor, oldest))

    def _count(self, cursor: sqlite3.Cursor, num_responses: int, num_bytes: int) -> None:
        cursor.execute(
            "UPDATE totals SET num_responses = num_responses + ?, num_bytes = num_bytes + ?", (num_responses, num_bytes)
        )


class OwnResponseStore:
    """The `ResponseStore` of a single process.

    Args:
        database: does the work, in threads.
    """

    def __init__(self, database: ResponseDatabase) -> None:
        self._database = database

    async def put(self, owner: str, response: StoredResponse) -> bool:
        """See `ResponseStore`."""
        return await _in_thread(lambda: self._database.put(owner, response))

    async def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """See `ResponseStore`."""
        return await _in_thread(lambda: self._database.get(owner, response_id))

    async def delete(self, owner: str, response_id: str) -> bool:
        """See `ResponseStore`."""
        return await _in_thread(lambda: self._database.delete(owner, response_id))

    async def find_items(self, owner: str, item_ids: Sequence[str]) -> dict[str, bytes]:
        """See `ResponseStore`."""
        return await _in_thread(lambda: self._database.find_items(owner, item_ids))


async def _in_thread(work: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(work)
    except sqlite3.Error as error:
        raise StoreAwayError(f"{type(error).__name__}: {error}") from error


def own_store(config: ResponsesConfig) -> OwnResponseStore | None:
    """A store that belongs to one router only; None if no responses are to be stored.

    Raises:
        ConfigError: its file cannot be used.
    """
    if not config.max_responses:
        return None
    return OwnResponseStore(ResponseDatabase(config.path, config.max_responses, config.max_bytes))
