"""`DatabaseRecord`: entries in a database, through SQLAlchemy."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.errors import RecordAwayError
from deployments.usage.entries import Entry, Spent, UsageQuery, UsageRow
from deployments.usage.sums import Sums
from llm.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Select, Table

logger = logging.getLogger("ray.serve")

_SUMS = ("num_requests", "prompt_tokens", "cached_tokens", "output_tokens")
_TEXTS = {"key": 64, "model": 256, "request_id": 128, "outcome": 16, "reason": 64}
_PLACES = {"key": 64, "model": 256, "refusal": 64}
"""Longest texts: some databases limit how long the parts of a primary key are together."""
_LIBPQ = ("psycopg", "psycopg2")
_LIBPQ_TIMEOUTS = {
    "connect_timeout": 5, "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}  # fmt: skip
"""In seconds, except the last one, which is in milliseconds."""


class DatabaseRecord:
    """A `Record` in three tables: every entry, sums by day, and each writer's last entry.

    Entries, sums and last numbers change in one transaction, so an entry that is sent again counts once. The tables are
    created if they do not exist.

    Args:
        url: SQLAlchemy's URL.

    Raises:
        ConfigError: SQLAlchemy or the database's driver is not installed, or the URL is not one.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._name = self._engine.url.render_as_string(hide_password=True)
        self._entries, self._days, self._writers = _tables()
        self._is_set_up = False
        self._file = _sqlite_file(self._engine)
        self._inode: int | None = None

    def append(self, entries: Sequence[Entry]) -> None:
        """See `Record`."""
        import sqlalchemy as sa

        if not entries:
            return
        with self._transaction() as connection:
            writers = self._writers
            mine = writers.c.writer == entries[0].writer
            last = connection.execute(sa.select(writers.c.seq).where(mine).with_for_update()).scalar()
            news = [entry for entry in entries if entry.seq > (last or 0)]
            if not news:
                return
            # First, so that a second process that delivers the same entries fails here, and then finds them delivered.
            if last is None:
                connection.execute(writers.insert(), {"writer": news[0].writer, "seq": news[-1].seq})
            else:
                connection.execute(writers.update().where(mine).values(seq=news[-1].seq))
            connection.execute(self._entries.insert(), [_as_columns(entry) for entry in news])
            sums = Sums()
            sums.add(news)
            for row in sums.rows():
                self._add_to_day(connection, row)

    def rows(self, query: UsageQuery) -> list[UsageRow]:
        """See `Record`."""
        import sqlalchemy as sa

        days = self._days.c
        asked: Select[Any] = sa.select(self._days)
        if not query.is_by_day:
            places = [days[name] for name in _PLACES]
            asked = sa.select(sa.literal(""), *places, *(sa.func.sum(days[name]) for name in _SUMS)).group_by(*places)
        asked = asked.where(days.day.between(query.first_day, query.last_day))
        if query.key is not None:
            asked = asked.where(days.key == query.key)
        if query.model is not None:
            asked = asked.where(days.model == query.model)
        with self._transaction() as connection:
            return sorted(
                (UsageRow(*row[:4], *map(int, row[4:])) for row in connection.execute(asked)),
                key=lambda row: (row.day, row.key, row.model, row.refusal),
            )

    def spent(self, keys: Sequence[str], today: str) -> dict[str, Spent]:
        """See `Record`."""
        import sqlalchemy as sa

        found = {key: Spent(today) for key in keys}
        if not found:
            return found
        days = self._days.c
        tokens = sa.func.sum(days.prompt_tokens + days.output_tokens)
        asked = (
            sa.select(days.key, days.day, tokens)
            .where(days.day.between(f"{today[:7]}-01", today), days.key.in_(list(found)))
            .group_by(days.key, days.day)
        )
        with self._transaction() as connection:
            for key, day, num_tokens in connection.execute(asked):
                found[key] = found[key].plus(int(num_tokens), day)
        return found

    def close(self) -> None:
        """See `Record`."""
        self._engine.dispose()

    def _add_to_day(self, connection: "Connection", row: UsageRow) -> None:
        import sqlalchemy as sa

        days = self._days
        place = {"day": row.day} | {name: getattr(row, name)[:length] for name, length in _PLACES.items()}
        more = {name: getattr(row, name) for name in _SUMS}
        same = sa.and_(*(days.c[name] == value for name, value in place.items()))
        change = days.update().where(same).values({name: days.c[name] + value for name, value in more.items()})
        if connection.execute(change).rowcount:
            return
        try:
            with connection.begin_nested():
                connection.execute(days.insert(), {**place, **more})
        except sa.exc.IntegrityError:  # another process has just begun the day
            connection.execute(change)

    @contextmanager
    def _transaction(self) -> "Iterator[Connection]":
        """A transaction, which is rolled back if anything fails.

        Raises:
            RecordAwayError: the database cannot be reached, or refuses.
        """
        import sqlalchemy as sa

        try:
            self._follow_file()
            if not self._is_set_up:
                self._entries.metadata.create_all(self._engine)
                self._is_set_up = True
                self._inode = _inode(self._file)
            with self._engine.begin() as connection:
                yield connection
        except (sa.exc.SQLAlchemyError, OSError) as error:
            # Of the error only its kind: its text may hold values, and the address with its password.
            logger.warning("the record of usage at %s cannot be reached now: %s", self._name, _kind(error))
            raise RecordAwayError(f"the database cannot be reached: {_kind(error)}") from None

    def _follow_file(self) -> None:
        """Open a file of SQLite's again where another one has taken its place, or none: what is written to the old one
        would be lost."""
        if self._is_set_up and _inode(self._file) != self._inode:
            logger.warning("the record of usage at %s is another file now", self._name)
            self._engine.dispose()
            self._is_set_up = False


def _sqlite_file(engine: "Engine") -> Path | None:
    """The file of a database of SQLite's; None for any other database."""
    name = engine.url.database
    return Path(name) if engine.dialect.name == "sqlite" and name and not name.startswith("file:") else None


def _inode(path: Path | None) -> int | None:
    """Which file this is; None for no file."""
    try:
        return path.stat().st_ino if path is not None else None
    except OSError:
        return None


def _kind(error: BaseException) -> str:
    cause = getattr(error, "orig", None)
    return type(cause if cause is not None else error).__name__


def _engine(url: str) -> "Engine":
    try:
        import sqlalchemy as sa
    except ImportError:
        raise ConfigError("accounts.record: a database needs SQLAlchemy: pip install 'rayline[accounts]'") from None
    try:
        parsed = sa.engine.make_url(url)
        options: dict[str, Any] = {"pool_pre_ping": True}
        if parsed.get_driver_name() in _LIBPQ:
            # A connection to a host that is gone would otherwise hold its thread for minutes, or hours.
            options["connect_args"] = dict(_LIBPQ_TIMEOUTS)
        engine = sa.create_engine(parsed, **options)
    except (ImportError, sa.exc.NoSuchModuleError) as error:
        kind = url.partition(":")[0]
        raise ConfigError(f"accounts.record: the driver for {kind} is not installed ({error})") from None
    except sa.exc.ArgumentError:
        raise ConfigError(
            "accounts.record: not the URL of a database, such as sqlite:///usage.db or "
            "postgresql+psycopg://user@host/db; a file of JSON lines ends in .jsonl"
        ) from None
    if engine.dialect.name == "sqlite":
        _begin_for_writing(engine)
    return engine


def _begin_for_writing(engine: "Engine") -> None:
    """Have SQLite lock at a transaction's beginning, not when it first writes: what was read by then might be old."""
    import sqlalchemy as sa

    @sa.event.listens_for(engine, "connect")
    def on_connect(connection: Any, _: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @sa.event.listens_for(engine, "begin")
    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _tables() -> "tuple[Table, Table, Table]":
    import sqlalchemy as sa

    metadata = sa.MetaData()
    entries = sa.Table(
        "rayline_usage", metadata,
        sa.Column("writer", sa.String(64), primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False, index=True),
        *(sa.Column(name, sa.String(length), nullable=False) for name, length in _TEXTS.items()),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _SUMS),
        sa.Column("duration_s", sa.Double, nullable=False),
    )  # fmt: skip
    days = sa.Table(
        "rayline_usage_days", metadata,
        sa.Column("day", sa.String(10), primary_key=True),
        *(sa.Column(name, sa.String(length), primary_key=True) for name, length in _PLACES.items()),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _SUMS),
    )  # fmt: skip
    writers = sa.Table(
        "rayline_usage_writers", metadata,
        sa.Column("writer", sa.String(64), primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
    )  # fmt: skip
    return entries, days, writers


def _as_columns(entry: Entry) -> dict[str, Any]:
    columns: dict[str, Any] = {name: getattr(entry, name)[:length] for name, length in _TEXTS.items()}
    return columns | {name: getattr(entry, name) for name in ("writer", "seq", "at", *_SUMS, "duration_s")}
