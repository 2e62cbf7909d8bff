"""Why a replica left: from what a router saw of its end to a sentence, and into the page's events."""

import asyncio
from dataclasses import replace

import pytest
from in_process import ServiceFactory, eventually
from test_fleet import IDLE

from deployments.channel.messages import Condition, Machine, Report
from deployments.fleet.departure import Cause, Traces, explain
from deployments.fleet.events import EventLog, FleetRecord
from deployments.serve.failures import end_of_actor

WELL = Condition("v1", machine=Machine("node-7", 1, 1 << 30, 2, 0.5))
SHUT_DOWN = Condition("v1", failure="the replica is shutting down", has_shut_down=True)
SILENT = Traces(WELL)
DIED = """The actor died unexpectedly before finishing this task.
	class_name: ServeReplica:app:EngineReplica
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file."""


@pytest.mark.parametrize(
    ("traces", "cause", "words"),
    [
        (SILENT, Cause.DIED, "without notice"),
        (replace(SILENT, call_error="its node was lost"), Cause.DIED, "its node was lost"),
        (replace(SILENT, silence_s=16.0), Cause.STALLED, "16 s"),
        (replace(SILENT, silence_s=1.9), Cause.DIED, "without notice"),
        (Traces(Condition("v1", failure="out of memory"), "a call failed", 20.0), Cause.BROKE_DOWN, "out of memory"),
        (Traces(SHUT_DOWN), Cause.SHUT_DOWN, "shut it down"),
        (Traces(SHUT_DOWN, call_error="the replica is gone"), Cause.SHUT_DOWN, "shut it down"),
        (Traces(SHUT_DOWN, is_autoscaled=True), Cause.SCALED_DOWN, "autoscaling"),
        (Traces(SHUT_DOWN, is_updating=True, is_autoscaled=True), Cause.REPLACED, "update"),
    ],
)
def test_what_the_traces_come_to(traces: Traces, cause: Cause, words: str):
    departure = explain(traces)
    assert departure.cause is cause
    assert words in departure.why
    assert cause.is_failure == (cause in (Cause.DIED, Cause.STALLED, Cause.BROKE_DOWN))


@pytest.mark.parametrize(
    ("report", "meaning"),
    [
        (DIED, "its process ended suddenly: it was killed, or crashed"),
        ("Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed due to the node running low on "
         "memory. The actor is dead because its worker process has died.", "short of memory"),
        ("The actor is dead because it was killed by `ray.kill`.", "Ray Serve ended its process"),
        ("The actor is dead because its node has died. Node Id: 1", "its node was lost"),
        ("whatever Ray says next year", "cannot be reached"),
    ],
)  # fmt: skip
def test_rays_report_on_an_actor_in_a_sentence(report: str, meaning: str):
    assert meaning in end_of_actor(report)


def test_events_are_bounded_and_forgotten():
    now = 1000.0
    log = EventLog(lambda: now)
    for number in range(150):
        log.add(f"event {number}", is_bad=number == 149)
    assert [item["text"] for item in log.items()] == [f"event {number}" for number in range(149, 49, -1)]
    assert log.items()[0] == {"at": 1000.0, "text": "event 149", "is_bad": True}
    now += 901
    assert log.items() == []


def test_departures_are_forgotten_like_events():
    now = 1000.0
    record = FleetRecord(lambda: now)
    record.note_departure("a", explain(SILENT), "node-7", 12.34)
    (one,) = record.departures()
    assert (one["replica_id"], one["node"], one["lived_s"], one["cause"]) == ("a", "node-7", 12.3, "died")
    assert record.events.items()[0]["is_bad"]
    now += 901
    assert record.departures() == []


async def test_a_replica_that_dies_is_told_from_one_that_is_shut_down(make_service: ServiceFactory):
    """One says that it ends, as `stop` makes it do; the other one's process is just gone: no last report."""
    service = await make_service(num_replicas=3)
    watch, client = service.router._watch, service.client
    await eventually(lambda: len(service.router.fleet.replica_ids) == 3)
    client.drain(0)
    client.end(0)  # stops it
    await eventually(lambda: len(watch.record.departures()) == 1)
    client.replicas[1]._loop._do(client.replicas[1]._loop._sender._routers.clear)  # nothing more leaves it
    client.drain(1)
    await eventually(lambda: len(watch.record.departures()) == 2)
    died, shut_down = watch.record.departures()
    assert (died["replica_id"], died["cause"], died["is_failure"]) == ("replica-1", "died", True)
    assert (shut_down["replica_id"], shut_down["cause"], shut_down["is_failure"]) == ("replica-0", "shut down", False)
    texts = [item["text"] for item in watch.record.events.items()]
    assert texts[0].startswith("Replica replica-1 was lost: its process ended without notice")
    assert "Ray Serve no longer lists replica replica-1" in texts
    assert "Replica replica-2 joined" in texts
    assert service.router.snapshot()["replicas"]["replica-1"]["why"] == died["why"]
    client.end(1)


async def test_a_replica_that_is_listed_again_has_not_left(make_service: ServiceFactory):
    """Serve's list may flicker; and what has left is told once."""
    service = await make_service(num_replicas=2)
    watch = service.router._watch
    await eventually(lambda: len(service.router.fleet.replica_ids) == 2)
    watch.set_running(frozenset({"replica-1"}))
    watch.set_running(frozenset({"replica-0", "replica-1"}))
    await asyncio.sleep(0)
    assert watch.record.departures() == []
    watch.set_running(frozenset({"replica-1"}))
    farewell = Condition(service.router.journal.fingerprint, failure="the replica is shutting down", has_shut_down=True)
    for _ in range(3):
        watch.take_report(Report("replica-0", IDLE, condition=farewell))
    assert [one["cause"] for one in watch.record.departures()] == ["shut down"]
    watch.set_running(frozenset({"replica-0", "replica-1"}))
