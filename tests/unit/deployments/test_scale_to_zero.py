"""A fleet without a replica: nobody is woken without need, and requests wait for whoever is being started."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from in_process import LocalClient, Service, emulated_config, end_service, eventually

from deployments.fleet.engine_client import Starts
from deployments.model_config import AdmissionConfig
from deployments.replica.engine_replica import EngineReplica

TIMEOUT_S = 0.5


@pytest.fixture
async def empty() -> AsyncIterator[Service]:
    """A service whose only replica does not run yet."""
    config = emulated_config(admission={"no_replica_timeout_s": TIMEOUT_S})
    client = LocalClient([EngineReplica(config, "replica-0")])
    client.drain(0)
    service = Service(config, client)
    yield service
    await end_service(service)


def ask(service: Service, **headers: str) -> "asyncio.Task":
    body = {"model": "demo", "prompt": "abc", "max_tokens": 5}
    return asyncio.create_task(service.http.post("/v1/completions", json=body, headers=headers))


async def test_a_new_router_wakes_nobody(empty: Service):
    """What the engines are is told when a replica starts anyway, and a request is what starts one."""
    await asyncio.sleep(0.5)
    assert empty.client.num_wake_ups == 0
    answer = await empty.http.get("/ready")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
    assert answer.headers["retry-after"]
    assert (await empty.http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"]
)
async def test_requests_wait_for_as_long_as_a_replica_is_starting(empty: Service, path: str):
    """Four times as long as they would wait for none."""
    empty.client.starts = Starts(1)
    body = {"prompt": "abc"} if path in ("/v1/completions", "/tokenize") else {
        "input" if path == "/v1/responses" else "messages": [{"role": "user", "content": "abc"}]
    }  # fmt: skip
    limit = {"max_output_tokens" if path == "/v1/responses" else "max_tokens": 5} if path != "/tokenize" else {}
    asking = [asyncio.create_task(empty.post(path, **body, **limit)) for _ in range(4)]
    await asyncio.sleep(4 * TIMEOUT_S)
    assert not any(task.done() for task in asking)
    assert empty.client.num_wake_ups == 1, "one call waits in Serve, however many requests wait here"
    empty.client.start(0)
    assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}


async def test_with_none_starting_they_are_refused_after_a_while(empty: Service):
    started = time.monotonic()
    answer = await ask(empty)
    assert time.monotonic() - started >= TIMEOUT_S
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_replica")
    assert int(answer.headers["retry-after"]) > 0
    assert empty.client.num_wake_ups == 1


async def test_a_start_that_is_given_up_ends_the_waiting(empty: Service):
    empty.client.starts = Starts(1)
    asking = ask(empty)
    await asyncio.sleep(3 * TIMEOUT_S)
    assert not asking.done()
    empty.client.starts = Starts()
    assert (await asking).json()["error"]["code"] == "no_replica"


async def test_a_controller_that_answers_no_more_keeps_nobody_waiting(empty: Service, monkeypatch):
    """Its last word was that a replica is starting; that counts for a while."""
    monkeypatch.setattr("deployments.fleet.start_watch._LIFETIME_S", 2.0)
    empty.client.starts = Starts(1)
    asking = ask(empty)
    await asyncio.sleep(3 * TIMEOUT_S)
    assert not asking.done()
    monkeypatch.setattr(empty.client, "replica_starts", asyncio.Event().wait)
    assert (await asking).json()["error"]["code"] == "no_replica"


async def test_the_clients_own_timeout_counts(empty: Service):
    empty.client.starts = Starts(1)
    answer = await ask(empty, **{"X-Request-Timeout": "0.3"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_a_fleet_that_goes_to_zero_later_behaves_alike(empty: Service):
    empty.client.start(0)
    assert (await ask(empty)).status_code == 200
    empty.client.drain(0)
    empty.client.starts = Starts(1)
    asking = ask(empty)
    await asyncio.sleep(3 * TIMEOUT_S)
    assert not asking.done()
    empty.client.start(0)
    assert (await asking).status_code == 200


WHY = "/models/demo/model.safetensors: no such file; download it again"


def told(service: Service) -> list[str]:
    """The fleet page's events that say that replicas fail to start."""
    return [event["text"] for event in service.directory.fleet_event()["events"] if WHY in event["text"]]


@pytest.mark.parametrize("num_starting", [0, 1])
async def test_starts_that_fail_again_and_again_end_the_waiting_with_the_reason(
    empty: Service, num_starting: int, caplog: pytest.LogCaptureFixture
):
    """As when the weights have vanished: Serve may try for ever, and each try counts as a replica on its way."""
    empty.router.dispatcher.config = AdmissionConfig(no_replica_timeout_s=3600)
    empty.client.starts = Starts(num_starting, failure=WHY, has_failed_repeatedly=True)
    for _ in range(2):
        async with asyncio.timeout(60):
            answer = (await ask(empty)).json()["error"]
        assert answer["code"] == "no_replica"
        assert WHY in answer["message"]
    assert len(told(empty)) == 1
    assert [WHY in record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [True]
    empty.client.starts = Starts()
    empty.client.start(0)
    await eventually(lambda: empty.router.can_answer)
    assert (await ask(empty)).status_code == 200, "what has been mended works again"


async def test_after_one_failed_start_the_next_one_is_waited_for_but_not_for_ever(empty: Service):
    empty.client.starts = Starts(1, failure=WHY)
    started = time.monotonic()
    answer = await ask(empty)
    assert time.monotonic() - started >= TIMEOUT_S
    assert WHY in answer.json()["error"]["message"]
    assert len(told(empty)) == 1
