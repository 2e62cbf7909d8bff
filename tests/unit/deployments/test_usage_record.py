"""The record of usage, in each of its kinds: real files, real SQLite, a real PostgreSQL server."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from usage_entries import MORNING, entry

from deployments.accounts_config import AccountsConfig
from deployments.errors import RecordAwayError
from deployments.usage.entries import Entry, Spent, UsageQuery, UsageRow
from deployments.usage.ledger import open_record
from deployments.usage.place import find_place
from deployments.usage.record import Record
from llm.errors import ConfigError

ALL = UsageQuery("0001-01-01", "9999-12-31")
TODAY = MORNING.date().isoformat()


def find_postgres() -> Path | None:
    """The directory of PostgreSQL's programs, which Debian does not put into the PATH."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((place for place in reversed(places) if (place / "postgres").exists()), None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server that listens on a socket file alone."""
    programs = find_postgres()
    if programs is None:
        if os.environ.get("POSTGRESQL") == "required":
            pytest.fail("POSTGRESQL=required, and there is no server")
        pytest.skip("needs PostgreSQL: make system-packages")
    # Short, because a socket's path may have 107 characters; and not owned by root, who may not run the server.
    directory = Path(subprocess.check_output(["mktemp", "-d", "/tmp/pg.XXXXXX"], text=True).strip())
    # The server refuses to run as root.
    is_root = os.geteuid() == 0
    if is_root:
        shutil.chown(directory, "postgres")
    who = {"user": "postgres", "group": "postgres", "extra_groups": []} if is_root else {}

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(directory / "data"), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=directory, timeout=120, **who)

    run("initdb", "-U", "rayline", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C")
    # Without -w pg_ctl would return before the server accepts connections.
    run("pg_ctl", "start", "-w", "-l", str(directory / "log"), "-o", f"-c listen_addresses='' -k {directory} -F")
    try:
        yield f"postgresql+psycopg://rayline@/postgres?host={directory}"
    finally:
        run("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(directory, ignore_errors=True)


Open = Callable[[], Record]


@pytest.fixture(params=["memory", "json lines", "sqlite", "postgresql"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens one and the same record, as a process does that starts."""
    if request.param == "memory":
        only = open_record(None)
        yield lambda: only
        return
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres")
        with sa.create_engine(url).begin() as connection:
            for table in ("", "_days", "_writers"):
                connection.execute(sa.text(f"DROP TABLE IF EXISTS rayline_usage{table}"))
    else:
        url = {"json lines": f"{tmp_path}/usage.jsonl", "sqlite": f"sqlite:///{tmp_path}/usage.db"}[request.param]
    opened: list[Record] = []

    def open_it() -> Record:
        opened.append(open_record(url))
        return opened[-1]

    yield open_it
    for record in opened:
        record.close()


def test_a_record_adds_up_and_remembers(open_again: Open):
    record = open_again()
    yesterday = MORNING - timedelta(days=1)
    record.append([entry(1), entry(2, at=yesterday), entry(3, model="other")])
    record.append([entry(1, writer="w2", key="else"), entry(2, writer="w2", outcome="refused", reason="tokens",
                   num_requests=7, prompt_tokens=0, cached_tokens=0, output_tokens=0)])  # fmt: skip
    rows = [
        UsageRow("2030-01-30", "team", "demo", "", 1, 10, 4, 5),
        UsageRow(TODAY, "else", "demo", "", 1, 10, 4, 5),
        UsageRow(TODAY, "team", "demo", "", 1, 10, 4, 5),
        UsageRow(TODAY, "team", "demo", "tokens", 7, 0, 0, 0),
        UsageRow(TODAY, "team", "other", "", 1, 10, 4, 5),
    ]
    for again in (record, open_again()):
        assert again.rows(ALL) == rows
        assert again.rows(UsageQuery(TODAY, TODAY, key="team", model="demo")) == rows[2:4]
        assert again.rows(UsageQuery("2030-01-30", "2030-01-30")) == rows[:1]
        assert again.rows(UsageQuery("2030-01-30", TODAY, is_by_day=False)) == [
            UsageRow("", "else", "demo", "", 1, 10, 4, 5),
            UsageRow("", "team", "demo", "", 2, 20, 8, 10),
            UsageRow("", "team", "demo", "tokens", 7, 0, 0, 0),
            UsageRow("", "team", "other", "", 1, 10, 4, 5),
        ]
        assert again.spent(["team", "new"], TODAY) == {"team": Spent(TODAY, 30, 45), "new": Spent(TODAY, 0, 0)}
        assert again.spent(["team"], "2030-02-01") == {"team": Spent("2030-02-01", 0, 0)}


def test_what_is_delivered_again_counts_once(open_again: Open):
    """A router cannot know whether the record had its entries before an answer was lost."""
    record = open_again()
    record.append([entry(1), entry(2)])
    record.append([entry(1), entry(2), entry(5)])
    again = open_again()
    again.append([entry(2), entry(5), entry(6)])
    again.append([])
    assert again.rows(ALL) == [UsageRow(TODAY, "team", "demo", "", 4, 40, 16, 20)]
    assert record.rows(ALL) == again.rows(ALL), "the first one sees what the other has appended"


def test_two_processes_may_have_the_record_at_once(open_again: Open):
    """As while a router is replaced: each entry counts once, even if both bring it."""
    records = [open_again(), open_again()]
    if records[0] is records[1]:
        pytest.skip("one process has it")

    def append(record: Record, *entries: Entry) -> None:
        """As routers do: where both bring an entry at the same moment, one of them may be told to come again."""
        while True:
            try:
                return record.append(entries)
            except RecordAwayError:
                time.sleep(0.01)

    def work(record: Record, writer: str) -> None:
        for seq in range(1, 41):
            append(record, entry(seq, writer=writer))
            append(record, entry(seq, writer="both", key="shared"))

    threads = [threading.Thread(target=work, args=(record, f"w{i}")) for i, record in enumerate(records)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_again().rows(ALL) == [
        UsageRow(TODAY, "shared", "demo", "", 40, 400, 160, 200),
        UsageRow(TODAY, "team", "demo", "", 80, 800, 320, 400),
    ]


def test_names_of_any_kind_are_kept(open_again: Open):
    record = open_again()
    names = ["Zoë; DROP TABLE rayline_usage; --", "日本語 😀", "'\"%s", "x" * 64]
    record.append([entry(i, key=name, request_id="y" * 200) for i, name in enumerate(names, 1)])
    assert sorted(row.key for row in open_again().rows(ALL)) == sorted(names)


def test_a_file_of_json_lines_survives_whoever_writes_to_it(tmp_path: Path):
    path = tmp_path / "deep" / "usage.jsonl"
    record = open_record(str(path))
    record.append([entry(1)])
    with path.open("ab") as file:
        file.write(b'{"writer":"w1","seq":2,"at":"2030-0')  # killed in the middle of a line
    again = open_record(str(path))
    again.append([entry(2)])
    assert [row.num_requests for row in open_record(str(path)).rows(ALL)] == [2]
    assert path.read_bytes().endswith(b"\n")
    path.rename(tmp_path / "old.jsonl")  # as a rotation does: what the process knows still counts
    again.append([entry(2), entry(3)])
    assert [row.num_requests for row in again.rows(ALL)] == [3]
    assert path.read_bytes().count(b"\n") == 1


def test_a_record_that_cannot_be_written_says_so_and_works_again(tmp_path: Path):
    (tmp_path / "place").write_text("a file where a directory should be")
    for url in (f"{tmp_path}/place/usage.jsonl", f"sqlite:///{tmp_path}/place/usage.db"):
        record = open_record(url)
        with pytest.raises(RecordAwayError):
            record.append([entry(1)])
    (tmp_path / "place").unlink()
    (tmp_path / "place").mkdir()
    record.append([entry(1)])
    assert len(record.rows(ALL)) == 1


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("usage.csv", "ends in .jsonl"),
        ("usage.db", "sqlite:///usage.db"),
        ("nonsense://x/y", "driver for nonsense"),
        ("://", "not the URL of a database"),
        ("mysql+pymysql://user:secret@host/db", "driver for mysql"),
    ],
)
def test_a_record_that_cannot_be(record: str, says: str):
    with pytest.raises(ConfigError) as raised:
        open_record(find_place(AccountsConfig(record=record)).record)
    assert says in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_paths_become_absolute_and_passwords_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert find_place(AccountsConfig()).spool is None, "nothing is written unasked"
    lines = find_place(AccountsConfig(record="usage.jsonl"))
    assert lines.record == f"{tmp_path}/usage.jsonl"
    assert lines.spool is not None
    assert lines.spool.startswith("/state/rayline/usage/")
    assert (
        find_place(AccountsConfig(record="sqlite:///u.db?timeout=3")).record == f"sqlite:///{tmp_path}/u.db?timeout=3"
    )
    monkeypatch.setenv("USAGE_URL", "postgresql+psycopg://u:secret@host/db")
    place = find_place(AccountsConfig(record_env="USAGE_URL", spool="spool"))
    assert place.record == "postgresql+psycopg://u:secret@host/db"
    assert place.spool is not None
    assert place.spool.startswith(f"{tmp_path}/spool/")
    assert "secret" not in repr(place)
    for wrong in (AccountsConfig(record_env="NOT_SET"), AccountsConfig(record="a.jsonl", record_env="USAGE_URL")):
        with pytest.raises(ConfigError):
            find_place(wrong)


def test_a_file_of_sqlite_that_was_moved_or_deleted_takes_no_more(tmp_path: Path):
    """As when a backup is put in its place: what would go on to the old file would be lost with the process."""
    path = tmp_path / "usage.db"
    record = open_record(f"sqlite:///{path}")
    record.append([entry(1)])
    path.rename(tmp_path / "moved.db")
    record.append([entry(2)])
    assert [row.num_requests for row in open_record(f"sqlite:///{path}").rows(ALL)] == [1]
    for file in tmp_path.glob("usage.db*"):
        file.unlink()
    assert record.rows(ALL) == []
    record.append([entry(3)])
    assert [row.num_requests for row in open_record(f"sqlite:///{path}").rows(ALL)] == [1]
    assert len(record.rows(ALL)) == 1


def test_a_database_that_vanishes_holds_nobody_up_for_long(postgres: str):
    """A connection to a host that has vanished would wait for hours; one that was cut off is opened again."""
    record = open_record(postgres)
    record.append([entry(1, writer="vanishing")])
    connection = record._engine.raw_connection()
    asked = connection.driver_connection.info.get_parameters()
    connection.close()
    assert int(asked["keepalives_idle"]) + 3 * int(asked["keepalives_interval"]) < 20
    assert int(asked["tcp_user_timeout"]) <= 20_000
    with sa.create_engine(postgres).begin() as other:
        other.execute(sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"))
    record.append([entry(2, writer="vanishing")])
    assert sum(row.num_requests for row in record.rows(ALL)) >= 2
    record.close()


def test_only_drivers_that_know_them_get_timeouts(monkeypatch: pytest.MonkeyPatch):
    """Another one would refuse to connect at all."""
    made: list[dict] = []
    create = sa.create_engine
    monkeypatch.setattr(sa, "create_engine", lambda url, **options: made.append(options) or create(url, **options))
    with pytest.raises(ConfigError, match="driver for postgresql"):
        open_record("postgresql+pg8000://u@h/d")
    assert "connect_args" not in made[-1]
