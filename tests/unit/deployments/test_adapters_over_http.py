"""Requests that choose adapters, and administrators who load them, over HTTP."""

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import DEMO, Service, ServiceFactory, emulated_config, eventually
from small_adapters import write_adapter
from test_model_directory import entry, platform, serving

from deployments.accounts_config import Role
from deployments.adapters import catalog as catalog_module, known as known_module
from deployments.router.keys import ApiKey
from llm.checkpoint.adapter_digest import adapter_digest

ENGINE = {"max_batch_size": 16, "num_pages": 2048, "max_adapters": 4}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "_LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(known_module, "_INTERVAL_S", 0.01)


@pytest.fixture
async def service(make_service: ServiceFactory, tmp_path: Path) -> Service:
    """Two replicas; the adapters one and two are served, and more may be loaded from a root."""
    write_adapter(tmp_path / "folder" / "two", seed=2)
    config = emulated_config(
        engine=ENGINE,
        adapters=[{"name": "one", "path": str(write_adapter(tmp_path / "fixed", seed=1))}],
        adapter_folder=str(tmp_path / "folder"),
        adapter_roots=[str(tmp_path / "roots")],
        allow_admin_without_keys=True,
    )
    service = await make_service(config, num_replicas=2)
    await eventually(lambda: service.directory.adapters.is_settled)
    return service


READ = {
    "/v1/chat/completions": lambda whole: whole["choices"][0]["message"]["content"],
    "/v1/completions": lambda whole: whole["choices"][0]["text"],
    "/v1/responses": lambda whole: whole["output"][-1]["content"][0]["text"],
    "/v1/messages": lambda whole: whole["content"][0]["text"],
    "/v1/embeddings": lambda whole: tuple(whole["data"][0]["embedding"]),
}


async def text(service: Service, model: str, **body: Any) -> str:
    fields = {"prompt": "abc", "max_tokens": 12, "ignore_eos": True, **body}
    answer = await service.post("/v1/completions", model=model, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return answer.json()["choices"][0]["text"]


async def test_every_generating_route_takes_an_adapter(service: Service):
    """Under its name, and differently from the model and from another adapter."""
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
        "/v1/completions": {"prompt": "Hi", "max_tokens": 8},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 8},
        "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
        "/v1/embeddings": {"input": "Hi"},
    }
    for path, body in bodies.items():
        seen = set()
        for model in ("demo", "one", "two"):
            answer = await service.post(path, model=model, **body)
            assert answer.status_code == 200, answer.text
            whole = answer.json()
            assert whole["model"] == model
            seen.add(READ[path](whole))
        assert len(seen) == 3, path
    counted = await service.post("/tokenize", model="one", prompt="abc")
    assert counted.json() == (await service.post("/tokenize", model="demo", prompt="abc")).json()
    metrics = (await service.http.get("/metrics")).text
    assert 'rayline:adapter_requests_total{adapter="one",model_name="demo",router="router"} 5.0' in metrics
    assert (
        sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("rayline:adapters_held{")) >= 2
    )


async def test_models_are_listed_with_their_adapters(service: Service, tmp_path: Path):
    listed = (await service.http.get("/v1/models")).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("demo", None), ("one", "demo"), ("two", "demo")]
    assert listed[1]["root"] == str(tmp_path / "fixed")
    assert (await service.http.get("/v1/models/two")).json() == listed[2]
    missing = await service.post("/v1/completions", model="three", prompt="a")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert (await service.http.get("/v1/models/three")).status_code == 404


async def test_administrators_see_which_replicas_hold_an_adapter(service: Service, tmp_path: Path):
    (tmp_path / "folder" / "broken").mkdir()
    (tmp_path / "folder" / "broken" / "adapter_config.json").write_text("{}")
    await text(service, "one")

    async def report_once(is_so: Callable[[dict], bool]) -> dict:
        async with asyncio.timeout(60):
            while not is_so(report := (await service.http.get("/rayline/adapters")).json()):
                await asyncio.sleep(0.01)
        return report

    report = await report_once(lambda report: bool(report["data"][0]["held_by"] and report["faults"]))
    one, two = report["data"]
    assert (one["name"], one["model"], one["source"], one["path"]) == (
        "one", "demo", "configured", str(tmp_path / "fixed"),
    )  # fmt: skip
    assert one["held_by"] in (["replica-0"], ["replica-1"])
    assert (two["name"], two["source"], two["held_by"]) == ("two", "folder", [])
    assert list(report["faults"]) == ["broken"]
    service.client.kill(int(one["held_by"][0][-1]))
    await report_once(lambda report: report["data"][0]["held_by"] == [])


async def test_streams_of_several_adapters_survive_a_replica(service: Service):
    """Resumed = uninterrupted, each with its own adapter."""
    names = ["demo", "one", "two"] * 3
    whole = {name: await text(service, name, max_tokens=1000) for name in set(names)}
    streams = [asyncio.ensure_future(text(service, name, max_tokens=1000)) for name in names]
    journal = service.router.journal
    await eventually(lambda: sum(len(g.token_ids) > 20 for g in journal.on_replica("replica-0")) > 1)
    service.client.kill(0)
    assert await asyncio.gather(*streams) == [whole[name] for name in names]
    assert journal.num_resumes > 0


async def test_requests_follow_the_replica_that_holds_the_adapter(service: Service):
    def is_held() -> bool:
        return any(replica["adapters"] for replica in service.directory.snapshot()["replicas"].values())

    await text(service, "one", max_tokens=1)
    await eventually(is_held)
    for _ in range(11):
        await text(service, "one", max_tokens=1)
    holders = [stats["replica_id"] for stats in await adapters_held(service) if stats["num"]]
    assert len(holders) == 1
    models = service.directory.fleet_event()["models"]
    assert models[0]["replicas"][holders[0]]["adapters"] == {"num": 1, "names": ["one"]}


async def adapters_held(service: Service) -> list[dict[str, Any]]:
    """How many adapters each replica says that it holds, once its report is here."""
    await asyncio.sleep(0.3)
    replicas = service.directory.snapshot()["replicas"]
    return [{"replica_id": name, "num": len(replica["adapters"])} for name, replica in replicas.items()]


async def test_a_cached_prompt_of_another_adapter_is_not_shared(service: Service):
    prompt = "a" * 200
    for model in ("demo", "one", "two"):
        for expected in (0, 192):
            body = {"prompt": prompt, "max_tokens": 1, "stream": False}
            usage = (await service.post("/v1/completions", model=model, **body)).json()["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            assert cached == expected, model
            await asyncio.sleep(0.3)  # the report that says what is cached


async def test_the_folder_is_followed(service: Service, tmp_path: Path):
    write_adapter(tmp_path / "folder" / "three", seed=3)
    adapters = service.directory.adapters
    await eventually(lambda: bool(adapters.find("three")))
    before = await text(service, "three")
    write_adapter(tmp_path / "folder" / "three", seed=4)
    changed = adapter_digest(tmp_path / "folder" / "three")
    await eventually(lambda: adapters.find("three")[0].digest == changed)
    assert await text(service, "three") != before
    shutil.rmtree(tmp_path / "folder" / "three")
    await eventually(lambda: not adapters.find("three"))
    assert (await service.post("/v1/completions", model="three", prompt="a")).status_code == 404


async def test_nothing_else_in_the_folder_keeps_adapters_from_being_found(service: Service, tmp_path: Path):
    """Links in a circle, to nowhere and to an adapter elsewhere, files that are half there, and a pipe."""
    folder = tmp_path / "folder"
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "nowhere").symlink_to(tmp_path / "nothing")
    (folder / "linked").symlink_to(write_adapter(tmp_path / "elsewhere", seed=5))
    (folder / "half").mkdir()
    (folder / "half" / "adapter_config.json").write_text('{"peft_type"')
    os.mkfifo(folder / "pipe")
    write_adapter(folder / "three", seed=3)
    adapters = service.directory.adapters
    await eventually(lambda: bool(adapters.find("three")) and bool(adapters.find("linked")))
    assert await text(service, "three") != await text(service, "linked")
    await eventually(lambda: {"circle", "half"} <= adapters.snapshot()["adapter_faults"].keys())
    assert adapters.find("two"), "those from before stay"


async def test_a_change_during_a_stream_does_not_reach_the_stream(service: Service, tmp_path: Path):
    """It keeps the adapter that it began with on its next replica, although the name now means another one."""
    whole = await text(service, "two", max_tokens=400)
    stream = asyncio.ensure_future(text(service, "two", max_tokens=400))
    journal = service.router.journal
    [generation] = await first_generations(service)
    await eventually(lambda: len(generation.token_ids) > 20)
    set_pace(service, 2.0)
    write_adapter(tmp_path / "folder" / "two", seed=9)
    changed = adapter_digest(tmp_path / "folder" / "two")
    await eventually(lambda: service.directory.adapters.find("two")[0].digest == changed)
    service.client.kill(int(generation.replica_id.removeprefix("replica-")))
    set_pace(service, 1000.0)
    assert await stream == whole
    assert journal.num_resumes == 1
    assert await text(service, "two", max_tokens=400) != whole


def set_pace(service: Service, tokens_per_s: float) -> None:
    for replica in service.client.replicas:
        engine = replica._loop._engine
        engine.emulation = engine.emulation.model_copy(update={"tokens_per_s": tokens_per_s})


async def first_generations(service: Service) -> list[Any]:
    await eventually(lambda: service.router.journal.num_live > 0)
    return list(service.router.journal._live.values())


async def load(service: Service, **body: Any) -> Any:
    return await service.http.post("/v1/load_lora_adapter", json=body)


async def test_adapters_are_loaded_and_unloaded_as_with_vllm(service: Service, tmp_path: Path):
    path = str(write_adapter(tmp_path / "roots" / "new", seed=5))
    loaded = await load(service, lora_name="new", lora_path=path)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    first = await text(service, "new")
    again = await load(service, lora_name="new", lora_path=path)
    assert again.status_code == 400
    assert "load_inplace" in again.json()["error"]["message"]
    write_adapter(tmp_path / "roots" / "new", seed=6)
    assert (await load(service, lora_name="new", lora_path=path, load_inplace=True)).status_code == 200
    assert await text(service, "new") != first

    async def unload(name: str) -> Any:
        return await service.http.post("/v1/unload_lora_adapter", json={"lora_name": name, "lora_int_id": 1})

    unloaded = await unload("new")
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert (await service.post("/v1/completions", model="new", prompt="a")).status_code == 404
    assert (await unload("new")).status_code == 404
    assert (await unload("two")).status_code == 400, "it comes from the folder"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "new"}, "lora_path"),
        ({"lora_path": "/"}, "lora_name"),
        ({"lora_name": 3, "lora_path": "/"}, "lora_name"),
        ({"lora_name": "new", "lora_path": "/etc"}, "lora_path"),
        ({"lora_name": "demo", "lora_path": "/etc"}, "lora_name"),
        ({"lora_name": "new", "lora_path": "/etc", "model": "gpt"}, "model"),
        ({"lora_name": "", "lora_path": "/etc"}, "lora_name"),
    ],
)
async def test_wrong_orders_are_refused_with_the_field(service: Service, body, param):
    answer = await load(service, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_only_administrators_load_adapters(make_service: ServiceFactory, tmp_path: Path):
    """Without keys nobody is one, unless the server is this machine's alone or a setting says so."""
    settings: dict[str, Any] = {"engine": ENGINE, "adapter_roots": [str(tmp_path)]}
    path = str(write_adapter(tmp_path / "a"))
    closed = await make_service(emulated_config(**settings))
    refused = await load(closed, lora_name="a", lora_path=path)
    assert refused.status_code == 403
    assert "allow_admin_without_keys" in refused.json()["error"]["message"]

    digests = {name: hashlib.sha256(name.encode()).digest() for name in ("boss", "user", "bound")}
    keys = (
        ApiKey("boss", digests["boss"], role=Role.ADMIN),
        ApiKey("user", digests["user"]),
        ApiKey("bound", digests["bound"], models=frozenset({"demo"})),
    )
    keyed = await make_service(emulated_config(**settings), keys=keys)
    assert (await load(keyed, lora_name="a", lora_path=path)).status_code == 401

    async def ask(key: str, path: str, **body: Any) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return (await keyed.http.post(path, json=body, headers=headers)).status_code

    order = {"lora_name": "a", "lora_path": path}
    assert await ask("user", "/v1/load_lora_adapter", **order) == 403
    assert await ask("boss", "/v1/load_lora_adapter", **order) == 200
    request = {"model": "a", "prompt": "b", "max_tokens": 1}
    asked = {key: await ask(key, "/v1/completions", **request) for key in digests}
    assert asked == {"boss": 200, "user": 200, "bound": 404}, "a key for some models may use only what it names"
    assert await ask("user", "/v1/unload_lora_adapter", lora_name="a") == 403


async def test_a_server_without_adapters_says_what_to_set(make_service: ServiceFactory):
    service = await make_service(emulated_config(allow_admin_without_keys=True))
    answer = await load(service, lora_name="a", lora_path="/a")
    assert answer.status_code == 400
    assert "engine.max_adapters" in answer.json()["error"]["message"]


async def test_a_catalog_that_is_away_changes_nothing(service: Service, tmp_path: Path, monkeypatch):
    from deployments.errors import CatalogAwayError

    async def away(*_: Any) -> Any:
        raise CatalogAwayError("it cannot be reached")

    client = service.directory.adapters._client
    for name in ("exchange", "load", "unload"):
        monkeypatch.setattr(client, name, away)
    assert await text(service, "one")
    answer = await load(service, lora_name="new", lora_path=str(tmp_path))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "adapters_unavailable"
    assert answer.headers["Retry-After"]
    assert (await service.post("/v1/completions", model="none", prompt="a")).status_code == 404
    await eventually(lambda: service.directory.snapshot()["router"]["is_adapter_catalog_away"])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"adapter_folder": "/tmp"}, "engine.max_adapters"),
        ({"engine": ENGINE, "adapters": [{"name": "a", "path": "/a"}] * 2}, "another name"),
        ({"engine": ENGINE, "adapters": [{"name": " a", "path": "/a"}]}, "printable"),
        ({"engine": ENGINE, "adapters": [{"name": "a"}]}, "path"),
        ({"engine": ENGINE, "adapter_roots": ["relative"]}, "absolute"),
        ({"engine": ENGINE, "adapters": [{"name": "demo", "path": str(DEMO)}]}, "another name"),
    ],
)
def test_settings_that_cannot_work(settings, why):
    with pytest.raises(ValueError, match=why):
        emulated_config(**settings)


async def test_several_models_have_adapters_of_their_own(tmp_path: Path):
    """A canary's entries share the requests for an adapter, each with its own files; other models have other names."""
    for place in ("v1/tuned", "v2/tuned", "roots/new"):
        write_adapter(tmp_path / place, seed=len(place))
    write_adapter(tmp_path / "v2" / "tuned", seed=2)
    settings: dict[str, Any] = {"engine": ENGINE, "adapter_roots": [str(tmp_path / "roots")]}
    config = platform(
        entry("chat", weight=0.5, adapter_folder=str(tmp_path / "v1"), **settings),
        entry("chat", weight=0.5, adapter_folder=str(tmp_path / "v2"), variant="v2", **settings),
        entry("small", aliases=["tiny"], **settings),
        allow_admin_without_keys=True,
    )
    async with serving(config) as service:
        await eventually(lambda: service.directory.adapters.is_settled)
        answers: dict[str, set[str]] = {}
        for session in map(str, range(24)):
            for _ in range(2):
                body = {"model": "tuned", "prompt": "abc", "max_tokens": 12, "ignore_eos": True}
                answer = await service.http.post("/v1/completions", json=body, headers={"X-Session-Id": session})
                answers.setdefault(session, set()).add(answer.json()["choices"][0]["text"])
        assert {len(texts) for texts in answers.values()} == {1}, "a session stays with its entry"
        assert len(set.union(*answers.values())) == 2, "both entries answer"
        listed = (await service.http.get("/v1/models")).json()["data"]
        assert [(one["id"], one["parent"]) for one in listed] == [("chat", None), ("small", None), ("tuned", "chat")]

        path = str(tmp_path / "roots" / "new")
        unnamed = await load(service, lora_name="new", lora_path=path)
        assert unnamed.json()["error"]["param"] == "model"
        assert (await load(service, lora_name="new", lora_path=path, model="tiny")).status_code == 200
        assert await text(service, "new")
        assert service.directory.routers[2].journal.num_requests == 1
