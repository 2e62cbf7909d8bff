"""The catalog of adapters: directories that come, change and go; orders of administrators; and what routers know."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import DEMO, eventually
from own_catalog import OwnCatalog
from small_adapters import write_adapter

from deployments.adapters import catalog as catalog_module, follower as follower_module
from deployments.adapters.catalog import Catalog, CatalogModel
from deployments.adapters.directory import AdapterRules, read_adapter
from deployments.adapters.follower import AdapterFollower
from deployments.adapters.known import KnownAdapters
from deployments.adapters.messages import (
    Ask,
    LoadOrder,
    Outcome,
    Reply,
    Source,
    decode_ask,
    decode_order,
    decode_outcome,
    decode_reply,
    encode,
)
from deployments.errors import CatalogAwayError
from llm.checkpoint.adapter_digest import adapter_digest
from llm.errors import CheckpointError, LLMError

RULES = AdapterRules(max_rank=8, max_bytes=1 << 30)


def read(directory: Path) -> str:
    return read_adapter(directory, RULES)


def follower(folder: Path | None = None, **options: Any) -> AdapterFollower:
    return AdapterFollower("demo", options.pop("entries", {}), folder, options.pop("most", 100), read, **options)


def look(one: AdapterFollower, times: int = 1) -> list[str]:
    """Look as often as it takes to read everything, and so many times more; returns the names that are found."""
    for _ in range(times):
        while one.look():
            pass
    return sorted(one.found)


def test_a_folder_is_followed(tmp_path):
    """Directories count at the second look that finds them the same, go at the second look without them, and a change
    gives another digest."""
    one = follower(tmp_path)
    write_adapter(tmp_path / "a", seed=1)
    write_adapter(tmp_path / "b", seed=2)
    (tmp_path / "notes.txt").write_text("no adapter")
    (tmp_path / "empty").mkdir()
    write_adapter(tmp_path / ".uploading", seed=3)
    assert look(one) == []
    assert not one.is_settled
    assert look(one) == ["a", "b"]
    assert one.is_settled
    assert one.found["a"].digest == adapter_digest(tmp_path / "a")
    assert one.found["a"].source is Source.FOLDER
    before = one.found["a"].digest

    write_adapter(tmp_path / "a", seed=4)
    look(one)
    assert one.found["a"].digest == before, "it has not settled"
    look(one)
    assert one.found["a"].digest == adapter_digest(tmp_path / "a") != before

    shutil.rmtree(tmp_path / "b")
    assert look(one) == ["a", "b"], "it may be back at once"
    assert look(one) == ["a"]
    assert one.faults == {}


def test_an_exchange_of_directories_is_not_a_removal(tmp_path):
    one = follower(tmp_path)
    write_adapter(tmp_path / "a", seed=1)
    new = write_adapter(tmp_path / ".new", seed=2)
    look(one, 2)
    (tmp_path / "a").rename(tmp_path / ".old")
    look(one)
    new.rename(tmp_path / "a")
    assert look(one) == ["a"]
    look(one)
    assert one.found["a"].digest == adapter_digest(tmp_path / "a")


def test_a_link_to_another_directory_is_a_change(tmp_path):
    """The path is that of the directory behind the link, which stays what it was."""
    folder = tmp_path / "served"
    folder.mkdir()
    first, second = write_adapter(tmp_path / "v1", seed=1), write_adapter(tmp_path / "v2", seed=2)
    (folder / "a").symlink_to(first)
    one = follower(folder)
    look(one, 2)
    assert one.found["a"].path == str(first)
    (folder / ".a").symlink_to(second)
    (folder / ".a").rename(folder / "a")
    look(one, 2)
    assert one.found["a"].path == str(second)
    assert one.found["a"].digest == adapter_digest(second)


def cut_short(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def make_pickle(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def make_pipe(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()
    os.mkfifo(directory / "adapter_model.safetensors")


def set_config(text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "adapter_config.json").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (cut_short, "damaged or cut short"),
        (make_pickle, "pickle"),
        (make_pipe, "not a file"),
        (lambda directory: (directory / "adapter_model.safetensors").unlink(), "cannot be read"),
        (
            set_config('{"peft_type": "LORA", "r": 9, "lora_alpha": 9}'),
            "rank 9 is more than engine.max_adapter_rank: 8",
        ),
        (set_config('{"peft_type": "LORA", "r": 300, "lora_alpha": 9}'), "rank 300 is more than engines take"),
        (set_config('{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 16}}'), "rank 16"),
        (set_config('{"peft_type": "LORA", "r": "4", "lora_alpha": 4}'), "adapter_config.json: r: "),
        (set_config('{"peft_type": "LORA", "r": 0, "lora_alpha": 4}'), "adapter_config.json: r: "),
        (set_config('{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": true}'), "use_dora is not supported"),
        (set_config('{"peft_type": "IA3"}'), "peft_type"),
        (set_config("[]"), "JSON object"),
        (set_config("{"), "JSON"),
    ],
)
def test_what_cannot_be_served_is_said_and_mended(tmp_path, spoil, why):
    one = follower(tmp_path)
    spoil(write_adapter(tmp_path / "a"))
    write_adapter(tmp_path / "b")
    assert look(one, 3) == ["b"]
    assert why in one.faults["a"]
    assert one.is_settled, "what is wrong does not hold up the rest"
    shutil.rmtree(tmp_path / "a")
    write_adapter(tmp_path / "a")
    assert look(one, 3) == ["a", "b"]
    assert one.faults == {}


def test_an_adapter_of_another_model_is_refused_with_its_shapes(tmp_path):
    write_adapter(tmp_path / "a")
    read_adapter(tmp_path / "a", AdapterRules(8, 1 << 30, str(DEMO)))
    from safetensors.torch import load_file, save_file

    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    narrow = {name: factor[:, :100].contiguous() if "lora_A" in name else factor for name, factor in factors.items()}
    save_file(narrow, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(LLMError, match="was the adapter trained on this model"):
        read_adapter(tmp_path / "a", AdapterRules(8, 1 << 30, str(DEMO)))


def test_names_that_cannot_be_adapters(tmp_path):
    one = follower(tmp_path, entries={"fixed": str(write_adapter(tmp_path / "elsewhere"))}, taken_names={"demo"})
    for name in ("demo", "fixed", "line\nbreak", "b" * 200):
        write_adapter(tmp_path / name)
    write_adapter(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")))
    assert look(one, 3) == ["b" * 200, "elsewhere", "fixed"]
    assert one.found["fixed"].source is Source.CONFIGURED
    assert one.faults.keys() == {"demo", "fixed", "line\nbreak", "\\udcff"}


def test_no_more_adapters_than_allowed(tmp_path):
    one = follower(tmp_path, most=2)
    for name in "abc":
        write_adapter(tmp_path / name)
    assert look(one, 3) == ["a", "b"]
    assert "max_known_adapters" in one.faults["c"]
    shutil.rmtree(tmp_path / "a")
    assert look(one, 4) == ["b", "c"]


def test_a_folder_that_cannot_be_read_keeps_what_it_had(tmp_path):
    folder = tmp_path / "folder"
    write_adapter(folder / "a")
    one = follower(folder)
    look(one, 2)
    folder.rename(tmp_path / "away")
    assert look(one, 5) == ["a"], "engines hold it, and its storage may come back"
    assert list(one.faults) == [""]
    assert "adapter_folder" in one.faults[""]
    (tmp_path / "away").rename(folder)
    write_adapter(folder / "b")
    assert look(one, 3) == ["a", "b"]
    assert one.faults == {}
    folder.rename(tmp_path / "away")
    look(one, 2)
    folder.mkdir()
    assert look(one, 3) == [], "an empty folder is another matter"


def test_a_configured_adapter_whose_storage_is_away_keeps_what_it_had(tmp_path):
    directory = write_adapter(tmp_path / "a")
    one = follower(entries={"a": str(directory)})
    assert look(one, 2) == ["a"]
    directory.rename(tmp_path / "away")
    assert look(one, 5) == ["a"]
    assert "is gone" in one.faults["a"]
    (tmp_path / "away").rename(directory)
    assert look(one, 1) == ["a"]
    assert one.faults == {}


def test_an_adapter_from_the_hub_is_asked_for_again(tmp_path, monkeypatch):
    """Others are served meanwhile."""
    now, asked = 0.0, []
    there = write_adapter(tmp_path / "downloaded")

    def resolve(name: str) -> Path:
        asked.append(name)
        if len(asked) < 2:
            raise CheckpointError("no network")
        return there

    monkeypatch.setattr(follower_module, "resolve_model_path", resolve)
    local = str(write_adapter(tmp_path / "local"))
    one = follower(entries={"far": "org/name", "near": local}, clock=lambda: now)
    assert look(one, 3) == ["near"]
    assert one.is_settled
    assert one.faults == {"far": "no network"}
    assert asked == ["org/name"]
    now = 60.0
    assert look(one, 3) == ["far", "near"]
    assert one.found["far"].path == str(there)
    assert one.faults == {}
    assert len(asked) == 2


class FarCatalog:
    """A `CatalogClient` whose messages are encoded, and whose catalog may be away or start again."""

    def __init__(self, make: Callable[[], Catalog]) -> None:
        self._make = make
        self.is_away = False
        self.restart()

    def restart(self) -> None:
        self.catalog = self._make()
        self.catalog.start()

    def _there(self) -> Catalog:
        if self.is_away:
            raise CatalogAwayError("away")
        return self.catalog

    async def exchange(self, ask: Ask) -> Reply:
        return decode_reply(encode(self._there().exchange(decode_ask(encode(ask)))))

    async def load(self, order: LoadOrder) -> Outcome:
        return decode_outcome(encode(await self._there().load(decode_order(encode(order)))))

    async def unload(self, name: str) -> Outcome:
        return decode_outcome(encode(await self._there().unload(name)))


def catalog_model(tmp_path: Path, key: str = "demo", name: str = "demo", **changes: Any) -> CatalogModel:
    fields = {"entries": (), "folder": None, "roots": (str(tmp_path / "roots"),), "most": 100, "rules": RULES}
    return CatalogModel(key, name, **{**fields, **changes})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "_LOOK_INTERVAL_S", 0.01)


async def test_orders_are_known_to_all_routers_and_outlive_the_catalog(tmp_path, quick):
    """Each router hears of it at the latest when it is asked for the name; a new catalog hears of it from them."""
    adapter = write_adapter(tmp_path / "roots" / "a", seed=1)
    write_adapter(tmp_path / "folder" / "kept")
    model = catalog_model(tmp_path, folder=str(tmp_path / "folder"))
    far = FarCatalog(lambda: Catalog([model], ["demo"], recovery_s=0.3))
    first, second = KnownAdapters(far), KnownAdapters(far)
    await eventually(lambda: far.catalog.is_settled)
    assert await first.load(LoadOrder("a", str(adapter))) is None
    assert first.find("a")[0].digest == adapter_digest(adapter)
    assert not second.find("a")
    assert (await second.find_anew("a"))[0].path == str(adapter)

    again = await second.load(LoadOrder("a", str(adapter)))
    assert again is not None
    assert "load_inplace" in again.message
    write_adapter(adapter, seed=2)
    assert await second.load(LoadOrder("a", str(adapter), replaces=True)) is None
    changed = adapter_digest(adapter)
    await first.refresh()
    assert first.find("a")[0].digest == changed

    far.is_away = True
    await first.refresh()
    assert first.is_away
    assert first.find("a"), "it stays as it is"
    with pytest.raises(CatalogAwayError):
        await first.load(LoadOrder("b", str(adapter)))
    far.is_away = False

    far.restart()
    early = await first.load(LoadOrder("b", str(adapter)))
    assert early is not None
    assert early.is_early
    await first.refresh()
    assert first.find("a"), "what the new catalog does not know yet is not lost"
    assert first.find("kept"), "nor is what it has not read yet"
    newcomer = KnownAdapters(far)
    assert (await newcomer.find_anew("a"))[0].digest == changed, "the first router has told the catalog"

    await eventually(lambda: far.catalog.is_settled)
    assert await newcomer.unload("a") is None
    await first.refresh()
    far.restart()  # the second router has not heard of the end, and tells of the adapter
    await second.refresh()
    await first.refresh()
    await eventually(lambda: far.catalog.is_settled)
    await second.refresh()
    assert not second.find("a"), "the later wish holds"
    unknown = await second.unload("a")
    assert unknown is not None
    assert unknown.is_unknown


@pytest.mark.parametrize(
    ("order", "param", "why"),
    [
        ({"path": "/etc"}, "lora_path", "adapter_roots"),
        ({"path": "{roots}/../a"}, "lora_path", "adapter_roots"),
        ({"path": "roots/a"}, "lora_path", "absolute"),
        ({"path": "{roots}/link"}, "lora_path", "adapter_roots"),
        ({"path": "{roots}/linked_weights"}, "lora_path", "adapter_roots"),
        ({"path": "{roots}/a\0"}, "lora_path", "adapter_roots"),
        ({"path": "{roots}-other/a"}, "lora_path", "adapter_roots"),
        ({"path": "{roots}/none"}, "lora_path", "not a directory"),
        ({"path": "{roots}/a", "name": "demo"}, "lora_name", "is a model"),
        ({"path": "{roots}/a", "name": "two\nlines"}, "lora_name", "printable"),
        ({"path": "{roots}/a", "name": "kept"}, "lora_name", "the setting adapters"),
        ({"path": "{roots}/a", "model": "other"}, "model", "takes no adapters"),
    ],
)
async def test_orders_that_are_refused(tmp_path, quick, order, param, why):
    roots = tmp_path / "roots"
    write_adapter(tmp_path / "a")
    write_adapter(tmp_path / "roots-other" / "a")
    write_adapter(roots / "a")
    (roots / "link").symlink_to(tmp_path / "a")
    write_adapter(roots / "linked_weights")
    (roots / "linked_weights" / "adapter_model.safetensors").unlink()
    (roots / "linked_weights" / "adapter_model.safetensors").symlink_to(tmp_path / "a" / "adapter_model.safetensors")
    model = catalog_model(tmp_path, entries=(("kept", str(tmp_path / "a")),))
    own = OwnCatalog(Catalog([model], ["demo"], recovery_s=0))
    known = KnownAdapters(own)
    await eventually(lambda: own.catalog.is_settled)
    order = {"name": "new", **order, "path": order["path"].replace("{roots}", str(roots))}
    refusal = await known.load(LoadOrder(**order, replaces=True))
    assert refusal is not None
    assert refusal.param == param
    assert why in refusal.message
    kept = await known.unload("kept")
    assert kept is not None
    assert "the setting adapters" in kept.message
    known.close()
    own.catalog.close()


async def test_entries_of_one_model_take_the_same_adapter_and_other_models_do_not(tmp_path, quick):
    """A canary's engines get adapters of their own under the same names; a name belongs to one model."""
    adapter = write_adapter(tmp_path / "roots" / "a")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_adapter(folder / "shared", seed=folders.index(folder))
    models = [
        catalog_model(tmp_path, "demo", folder=str(folders[0])),
        catalog_model(tmp_path, "demo-2", folder=str(folders[1])),
        catalog_model(tmp_path, "other", "other", entries=(("a", str(adapter)),)),
    ]
    own = OwnCatalog(Catalog(models, ["demo", "other"], recovery_s=0))
    known = KnownAdapters(own)
    await eventually(lambda: own.catalog.is_settled)
    await known.refresh()
    assert [one.key for one in known.find("shared")] == ["demo", "demo-2"]
    assert len({one.digest for one in known.find("shared")}) == 2
    unnamed = await known.load(LoadOrder("b", str(adapter)))
    assert unnamed is not None
    assert unnamed.param == "model"
    taken = await known.load(LoadOrder("a", str(adapter), "demo", True))
    assert taken is not None
    assert await known.load(LoadOrder("b", str(adapter), "demo")) is None
    assert [one.key for one in known.find("b")] == ["demo", "demo-2"]
    known.close()
    own.catalog.close()


async def test_a_router_does_not_say_there_is_none_before_all_are_read(tmp_path, quick, monkeypatch):
    """And the catalog is asked once for all who ask at the same time."""
    for i in range(5):
        write_adapter(tmp_path / "folder" / str(i))
    own = OwnCatalog(Catalog([catalog_model(tmp_path, folder=str(tmp_path / "folder"))], recovery_s=0))
    known = KnownAdapters(own)
    assert not known.is_settled
    await known.refresh()
    assert not known.is_settled
    await eventually(lambda: own.catalog.is_settled)
    num_asked, exchange = 0, own.exchange

    async def counted(ask: Ask) -> Reply:
        nonlocal num_asked
        num_asked += 1
        await asyncio.sleep(0.01)
        return await exchange(ask)

    monkeypatch.setattr(own, "exchange", counted)
    found = await asyncio.gather(*(known.find_anew(str(i % 6)) for i in range(60)))
    assert sum(bool(one) for one in found) == 50
    assert num_asked <= 2
    assert known.is_settled
    assert [one.name for (one,) in known.all()] == list("01234")
    assert known.names_of([known.find("3")[0].digest, "?"]) == ["0"], "all five are the same adapter"
    known.close()
    own.catalog.close()


def test_a_catalog_is_not_settled_before_it_shows_what_it_has_found(tmp_path):
    """Its followers look in a thread; a router that asks just then would take an adapter for one that there is not."""
    write_adapter(tmp_path / "folder" / "a")
    catalog = Catalog([catalog_model(tmp_path, "demo", folder=str(tmp_path / "folder"))], ["demo"], recovery_s=0)
    [one] = catalog._followers
    assert look(one, 3) == ["a"]
    reply = catalog.exchange(Ask("", -1))
    assert (one.is_settled, reply.is_settled, reply.adapters) == (True, False, [])
    catalog._show()
    reply = catalog.exchange(Ask("", -1))
    assert reply.is_settled
    assert [adapter.name for adapter in reply.adapters or ()] == ["a"]
