"""Stores of files and batches: directories and fsspec do the same; whoever makes an object first has made it."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from deployments.batches.fsspec_store import FsspecStore
from deployments.batches.local_store import LocalStore
from deployments.batches.open_store import open_store
from deployments.batches.store import ByteRange, Store
from deployments.batches_config import BatchesConfig, resolve_store
from llm.errors import ConfigError


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "directory":
        return open_store(str(tmp_path / "store"))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    return open_store("memory://batches/here")


def test_objects_are_written_read_listed_and_deleted(store: Store):
    assert store.names("a") == []
    store.write("a/b/two", b"2")
    store.write("a/b/one", b"1")
    store.write("a/b/one", b"one")
    assert (store.names("a"), store.names("a/b")) == (["b"], ["one", "two"])
    assert store.read("a/b/one") == b"one"
    ranges = [ByteRange("a/b/one", 1, 3), ByteRange("a/b/two", 0, 9), ByteRange("a/b/one", 0, 1)]
    assert store.read_ranges(ranges) == [b"ne", b"2", b"o"]
    store.delete("a/b/one")
    store.delete("a/b/one")
    store.delete("a/b/two")
    assert store.names("a") == []
    for missing in (lambda: store.read("a/b/one"), lambda: store.read_ranges([ByteRange("a/b/one", 0, 1)])):
        with pytest.raises(FileNotFoundError):
            missing()


def test_of_many_that_make_an_object_one_succeeds(store: Store):
    for round_ in range(20):
        made: list[int] = []
        start = threading.Barrier(8)

        def make(number: int, name: str = f"x/{round_}", made: list[int] = made, start=start) -> None:
            start.wait()
            if store.create(name, str(number).encode()):
                made.append(number)

        threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert store.read(f"x/{round_}") == str(made[0]).encode()


def test_a_long_object_is_written_bit_by_bit(store: Store):
    writer = store.writer("c/long")
    for number in range(100):
        writer.write(b"%03d" % number * 1000)
    writer.commit()
    writer.abort()
    assert store.read("c/long") == b"".join(b"%03d" % number * 1000 for number in range(100))


def test_an_object_that_is_given_up_does_not_appear(tmp_path: Path):
    store = LocalStore(tmp_path)
    writer = store.writer("c/half")
    writer.write(b"half")
    writer.abort()
    lost = store.writer("c/lost")  # its process has died
    lost.write(b"lost")
    assert store.names("c") == []
    store.drop_leftovers(3600)
    assert len(list((tmp_path / ".unfinished").iterdir())) == 1
    store.drop_leftovers(0)
    assert not list((tmp_path / ".unfinished").iterdir())


def test_a_folder_that_is_removed_while_something_is_written_to_it_comes_back(tmp_path: Path):
    """The last object of a folder goes with the folder, while another thread writes one there."""
    store = LocalStore(tmp_path)
    failures: list[OSError] = []

    def repeat(work: Callable[[int], None]) -> None:
        try:
            for number in range(300):
                work(number)
        except OSError as error:
            failures.append(error)

    def write_and_delete(name: str) -> Callable[[int], None]:
        def work(number: int) -> None:
            store.write(f"f/g/{name}", b"x")
            assert store.read(f"f/g/{name}") == b"x"
            store.delete(f"f/g/{name}")

        return work

    threads = [threading.Thread(target=repeat, args=(write_and_delete(name),)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_nobody_else_can_read_the_directory(tmp_path: Path):
    store = LocalStore(tmp_path / "store")
    store.write("a/b", b"secret")
    for place in ("store", "store/a", "store/a/b"):
        assert (tmp_path / place).stat().st_mode & 0o077 == 0


def test_stores_that_cannot_be_used_are_named(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"batches\.store: .*file/store cannot be used"):
        open_store(str(tmp_path / "file" / "store"))
    with pytest.raises(ConfigError, match=r"batches\.store: nonsense://x"):
        FsspecStore("nonsense://x")
    with pytest.raises(ValueError, match="nonsense:// cannot be used here: Protocol not known"):
        BatchesConfig(store="nonsense://x")
    with pytest.raises(ValueError, match="is empty; give a directory"):
        BatchesConfig(store="file://")


def test_whatever_a_storage_package_raises_says_that_the_store_is_away(monkeypatch: pytest.MonkeyPatch):
    """S3's package, for one, raises errors of its own when the address cannot be reached."""

    class ConnectError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ConnectError("http://secret")

    store = FsspecStore("memory://away")
    for name in ("cat_file", "cat_ranges", "pipe_file", "ls", "rm_file", "open"):
        monkeypatch.setattr(store._files, name, fail)
    for attempt in (
        lambda: store.read("a"), lambda: store.read_ranges([ByteRange("a", 0, 1)]), lambda: store.write("a", b""),
        lambda: store.create("a", b""), lambda: store.names("a"), lambda: store.delete("a"), lambda: store.writer("a"),
    ):  # fmt: skip
        with pytest.raises(OSError, match="ConnectError of the store"):
            attempt()


def test_a_relative_directory_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for given, wanted in (
        ("a", str(tmp_path / "a")),
        ("file:///b", "/b"),
        ("memory://c/d", "memory://c/d"),
        (None, None),
    ):
        assert resolve_store(BatchesConfig(store=given)).store == wanted
    assert [BatchesConfig(store=place).is_shared for place in ("a", "memory://a", None)] == [True, False, True]
