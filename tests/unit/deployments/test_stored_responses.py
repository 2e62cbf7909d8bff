"""Responses that are kept: conversations that go on, what can be read of them, whose they are, and what goes first."""

import hashlib
import json
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory, emulated_config
from openai.types.responses import Response
from openai.types.responses.response_item_list import ResponseItemList
from scripted_engine import THINK_TEMPLATE, TOOL_TEMPLATE, model_config, use_script

from deployments.api.openai.response_store import (
    OwnResponseStore,
    ResponseDatabase,
    StoredItem,
    StoredResponse,
)
from deployments.errors import StoreAwayError
from deployments.router.keys import ApiKey
from llm.errors import ConfigError

FIRST, SECOND = "sk-first", "sk-second"
KEYS = tuple(ApiKey(name, hashlib.sha256(key.encode()).digest()) for name, key in (("a", FIRST), ("b", SECOND)))
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 17}}</tool_call>'


async def respond(service: Service, key: str = "", **fields) -> dict:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": "demo", "max_output_tokens": 8, **fields}
    answer = await service.http.post("/v1/responses", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    if fields.get("stream"):
        last = answer.text.strip().split("\n\n")[-1]
        return json.loads(last.partition("data: ")[2])["response"]
    return answer.json()


async def input_items(service: Service, response_id: str, **query) -> list[dict]:
    answer = await service.http.get(f"/v1/responses/{response_id}/input_items", params={"order": "asc", **query})
    assert answer.status_code == 200, answer.text
    ResponseItemList.model_validate_json(answer.content)
    return answer.json()["data"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_goes_on(make_service: ServiceFactory, monkeypatch, tmp_path: Path, stream: bool):
    """The model is told all that was said, but earlier instructions: as if the client had sent it."""
    use_script(monkeypatch, "Seven.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    first = await respond(service, input="3 + 4?", instructions="Be brief.", stream=stream)
    assert (first["store"], first["previous_response_id"]) == (True, None)
    second = await respond(service, input="Sure?", previous_response_id=first["id"], stream=stream)
    assert second["previous_response_id"] == first["id"]
    history = [{"role": "user", "content": "3 + 4?"}, *first["output"]]
    alone = await respond(service, input=[*history, {"role": "user", "content": "Sure?"}])
    assert second["usage"]["input_tokens"] == alone["usage"]["input_tokens"]
    third = await respond(service, input="Really?", previous_response_id=second["id"])
    told = [(item["role"], item["content"][0]["text"]) for item in await input_items(service, third["id"])]
    assert told == [("user", "3 + 4?"), ("assistant", "Seven."), ("user", "Sure?"), ("assistant", "Seven."),
                    ("user", "Really?")]  # fmt: skip


async def test_a_call_and_its_result_over_two_requests(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, f"Hm.</think>{CALL}")
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    first = await respond(service, input="17 + 25?", tools=[TOOL], max_output_tokens=100)
    thoughts, call = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "42"}
    second = await respond(service, input=[result], previous_response_id=first["id"], tools=[TOOL])
    items = await input_items(service, second["id"])
    assert [item["type"] for item in items] == ["message", "reasoning", "function_call", "function_call_output"]
    assert items[1:3] == [thoughts, call], "as they were given"


async def test_items_by_reference(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "Seven.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    first = await respond(service, input="3 + 4?")
    (message,) = first["output"]
    again = [{"role": "user", "content": "3 + 4?"}, {"type": "item_reference", "id": message["id"]},
             {"role": "user", "content": "Sure?"}]  # fmt: skip
    by_reference = await respond(service, input=again)
    in_full = await respond(service, input=[again[0], message, again[2]])
    assert by_reference["usage"]["input_tokens"] == in_full["usage"]["input_tokens"]
    bare = await respond(service, input=[again[0], {"id": message["id"]}, again[2]])
    assert bare["usage"]["input_tokens"] == in_full["usage"]["input_tokens"]
    answer = await service.post("/v1/responses", input=[{"type": "item_reference", "id": "msg_lost"}])
    assert answer.status_code == 400
    assert "'msg_lost'" in answer.json()["error"]["message"]


async def test_read_list_and_delete(make_service: ServiceFactory):
    service = await make_service()
    items = [{"role": ("user", "assistant")[i % 2], "content": f"number {i}"} for i in range(5)]
    response = await respond(service, input=items, metadata={"a": "b"})
    path = f"/v1/responses/{response['id']}"
    stored = await service.http.get(path)
    assert stored.json() == response
    streamed = await service.http.get(path, params={"stream": "true"})
    assert (streamed.status_code, streamed.json()["error"]["param"]) == (400, "stream")
    Response.model_validate_json(stored.content, strict=True)
    texts = [item["content"][0]["text"] for item in (await service.http.get(f"{path}/input_items")).json()["data"]]
    assert texts == [f"number {i}" for i in (4, 3, 2, 1, 0)], "the newest first"
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await service.http.get(f"{path}/input_items", params={"limit": 2, "order": "asc", **after})).json()
        found += [item["content"][0]["text"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert found == [f"number {i}" for i in range(5)]
    for query in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"order": "up"}, {"after": "msg_none"}):
        wrong = await service.http.get(f"{path}/input_items", params=query)
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, next(iter(query)))
    deleted = await service.http.delete(path)
    assert deleted.json() == {"id": response["id"], "object": "response", "deleted": True}
    for gone in (await service.http.get(path), await service.http.get(f"{path}/input_items"),
                 await service.http.delete(path)):  # fmt: skip
        assert gone.status_code == 404
        assert response["id"] in gone.json()["error"]["message"]


async def test_an_unknown_response_is_named(make_service: ServiceFactory):
    service = await make_service()
    answer = await service.post("/v1/responses", input="a", previous_response_id="resp_lost")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
    assert "resp_lost" in error["message"]


async def test_nobody_finds_what_another_key_has_stored(make_service: ServiceFactory):
    service = await make_service(keys=KEYS)
    response = await respond(service, FIRST, input="secret")
    path = f"/v1/responses/{response['id']}"
    item_id = response["output"][0]["id"]
    other = {"Authorization": f"Bearer {SECOND}"}
    for answer in (
        await service.http.get(path, headers=other),
        await service.http.get(f"{path}/input_items", headers=other),
        await service.http.delete(path, headers=other),
    ):
        assert answer.status_code == 404
    for body in ({"input": "a", "previous_response_id": response["id"]},
                 {"input": [{"type": "item_reference", "id": item_id}]}):  # fmt: skip
        answer = await service.http.post("/v1/responses", json={"model": "demo", **body}, headers=other)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] in ("previous_response_not_found", "item_not_found")
    assert (await service.http.get(path)).status_code == 401
    own = {"Authorization": f"Bearer {FIRST}"}
    assert (await service.http.get(path, headers=own)).json() == response


async def test_what_is_not_to_be_stored_is_not(make_service: ServiceFactory):
    service = await make_service()
    response = await respond(service, input="a", store=False)
    assert response["store"] is False
    assert (await service.http.get(f"/v1/responses/{response['id']}")).status_code == 404
    without = await make_service(emulated_config(responses={"max_responses": 0}))
    response = await respond(without, input="a", store=True)
    assert response["store"] is False
    assert (await without.http.get(f"/v1/responses/{response['id']}")).status_code == 404
    answer = await without.post("/v1/responses", input="a", previous_response_id=response["id"])
    assert answer.status_code == 400


async def test_the_oldest_go_first(make_service: ServiceFactory):
    """A conversation can go on when its beginning has gone."""
    service = await make_service(emulated_config(responses={"max_responses": 2}))
    ids = [(await respond(service, input="one"))["id"]]
    for text in ("two", "three"):
        ids.append((await respond(service, input=text, previous_response_id=ids[-1]))["id"])
    assert [(await service.http.get(f"/v1/responses/{i}")).status_code for i in ids] == [404, 200, 200]
    assert [item["content"][0]["text"] for item in await input_items(service, ids[2])][::2] == ["one", "two", "three"]
    answer = await service.post("/v1/responses", input="a", previous_response_id=ids[0])
    assert ids[0] in answer.json()["error"]["message"]


class AwayStore(OwnResponseStore):
    """A store that has gone away."""

    is_away = False

    async def put(self, owner, response):
        if self.is_away:
            raise StoreAwayError("it is being replaced")
        return await super().put(owner, response)

    async def get(self, owner, response_id):
        if self.is_away:
            raise StoreAwayError("it is being replaced")
        return await super().get(owner, response_id)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_store_that_is_away_costs_no_answer(make_service: ServiceFactory, serve_log, stream: bool):
    store = AwayStore(ResponseDatabase(None, 10, 1 << 20))
    service = await make_service(store=store)
    first = await respond(service, input="a")
    store.is_away = True
    assert (await respond(service, input="a", stream=stream))["status"] == "incomplete"
    assert any("is not stored" in record.getMessage() for record in serve_log)
    for answer in (await service.post("/v1/responses", input="a", previous_response_id=first["id"]),
                   await service.http.get(f"/v1/responses/{first['id']}")):  # fmt: skip
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
        assert answer.headers["retry-after"]


def stored(number: int, items: list[StoredItem], num_bytes: int = 100) -> StoredResponse:
    head = json.dumps({"id": f"resp_{number}", "padding": "x" * num_bytes}).encode()
    return StoredResponse(f"resp_{number}", head, tuple(items), (StoredItem(f"msg_{number}", b'{"n": %d}' % number),))


def conversation(length: int, num_bytes: int) -> list[StoredItem]:
    return [StoredItem(f"item_{i}", json.dumps({"i": i, "text": "y" * num_bytes}).encode()) for i in range(length)]


def test_items_that_come_again_are_kept_once():
    """A conversation of n responses takes room in proportion to n, not to its square; all of it is given back."""
    database = ResponseDatabase(None, 1000, 1 << 30)
    items = conversation(50, 1000)
    for number in range(50):
        database.put("me", stored(number, items[: number + 1]))
    num_responses, num_bytes = database.totals()
    assert num_responses == 50
    assert num_bytes < 50 * 2000 + 50 * 51 // 2 * 150
    for number in reversed(range(50)):
        assert database.get("me", f"resp_{number}") == stored(number, items[: number + 1])
        assert database.delete("me", f"resp_{number}")
    assert database.totals() == (0, 0)


def test_bounds_hold_for_count_and_bytes():
    database = ResponseDatabase(None, 3, 10_000)
    for number in range(5):
        assert database.put("me", stored(number, []))
    assert [database.get("me", f"resp_{number}") is not None for number in range(5)] == [False, False, True, True, True]
    assert database.put("you", stored(5, conversation(1, 7000)))
    assert database.totals()[1] <= 10_000
    assert database.get("you", "resp_5") is not None
    assert not database.put("me", stored(6, conversation(1, 20_000))), "it is larger than all the room"
    assert database.get("you", "resp_5") is not None, "and lets nothing go"


def test_an_item_that_changed_is_not_mixed_up():
    """A client may send another item under an id that it has from us: each response keeps what it was made of."""
    database = ResponseDatabase(None, 10, 1 << 20)
    old, new = StoredItem("item", b'"old"'), StoredItem("item", b'"new"')
    database.put("me", stored(1, [old, old]))
    database.put("me", stored(2, [new]))
    database.put("you", stored(3, [StoredItem("item", b'"yours"')]))
    assert database.get("me", "resp_1").input == (old, old)
    assert database.get("me", "resp_2").input == (new,)
    assert database.find_items("me", ["item", "other"]) == {"item": b'"new"'}
    database.delete("me", "resp_2")
    assert database.find_items("me", ["item"]) == {"item": b'"old"'}


def test_a_file_outlasts_the_process_and_is_for_nobody_else(tmp_path: Path):
    path = tmp_path / "responses.db"
    first = ResponseDatabase(str(path), 10, 1 << 20)
    first.put("me", stored(1, conversation(3, 10)))
    both = ResponseDatabase(str(path), 10, 1 << 20)
    both.put("me", stored(2, []))
    assert first.get("me", "resp_2") is not None, "two processes may have it, as while one replaces the other"
    first.close()
    both.close()
    assert path.stat().st_mode & 0o077 == 0
    again = ResponseDatabase(str(path), 10, 1 << 20)
    assert again.get("me", "resp_1") == stored(1, conversation(3, 10))
    assert again.totals()[0] == 2
    with pytest.raises(ConfigError, match=r"responses\.path"):
        ResponseDatabase(str(tmp_path), 10, 1 << 20)
    (tmp_path / "other").write_text("no database" * 100)
    with pytest.raises(ConfigError, match=r"responses\.path"):
        ResponseDatabase(str(tmp_path / "other"), 10, 1 << 20)
