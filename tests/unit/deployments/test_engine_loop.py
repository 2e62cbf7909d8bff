"""The emulated engine and the thread that owns an engine."""

import asyncio
import threading
import time

import pytest
from in_process import emulated_config, eventually

from deployments.channel.messages import Failure, FailureKind
from deployments.model_config import EmulationConfig
from deployments.replica import emulated_engine
from deployments.replica.emulated_engine import EmulatedEngine
from deployments.replica.engine_loop import EngineLoop
from deployments.replica.engine_replica import EngineReplica
from deployments.serve.ingress import channel_host
from llm.config import EngineConfig
from llm.errors import EngineError, InvalidRequestError
from llm.serving.schemas import FinishReason, GenerationRequest, StepOutput


def make_engine(**changes: float) -> EmulatedEngine:
    emulation = EmulationConfig.model_validate({"tokens_per_s": 500.0, "max_seq_len": 256, **changes})
    return EmulatedEngine(EngineConfig(max_batch_size=4, num_pages=64), emulation, vocab_size=264)


def request(**fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt_token_ids": (1, 2, 3), "max_new_tokens": 10, **fields})


def run(engine: EmulatedEngine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.scheduler.has_pending_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


@pytest.fixture
def loop():
    loop = EngineLoop(make_engine(tokens_per_s=50.0), "replica")
    loop.start()
    yield loop
    loop.stop()


class Clock:
    """Time that passes by sleeping alone, so that a pace is exact on a busy machine too."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_an_emulated_stream_has_its_pace_and_goes_on_elsewhere(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(emulated_engine, "time", clock)
    engine = make_engine(tokens_per_s=100.0)
    engine.add_request(request(request_id="a", max_new_tokens=20))
    whole = run(engine)["a"]
    assert clock.now - 1000 == pytest.approx(20 / 100, abs=0.01)
    engine.add_request(request(request_id="b", max_new_tokens=20, output_token_ids=tuple(whole[:8])))
    assert run(engine)["b"] == whole[8:]


def test_emulated_rows_and_pages_are_limited_and_come_back():
    engine = make_engine()
    ids = [engine.add_request(request()) for _ in range(10)]
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (4, 6)
    assert engine.abort(ids[0])
    assert engine.abort(ids[9])
    assert not engine.abort("unknown")
    assert {len(tokens) for tokens in run(engine).values()} == {9, 10}
    stats = engine.stats()
    assert stats.num_used_pages == 0
    assert stats.num_free_pages == stats.num_pages
    with pytest.raises(InvalidRequestError):
        engine.add_request(request(prompt_token_ids=(1,) * 256))


async def test_every_request_gets_its_reply(loop: EngineLoop):
    replies = await asyncio.gather(*(loop.generate(request()) for _ in range(9)))
    assert all(len(reply.token_ids) == 10 and reply.end.reason is FinishReason.LENGTH for reply in replies)


async def test_a_refusal_is_a_reply(loop: EngineLoop):
    reply = await loop.generate(request(prompt_token_ids=(999,)))
    assert reply.refusal.param == "prompt"
    assert reply.end is None


async def test_cancelling_aborts(loop: EngineLoop):
    task = asyncio.ensure_future(loop.generate(request(max_new_tokens=200)))
    await eventually(lambda: loop.latest_stats.num_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: loop.latest_stats.num_running == 0)
    assert loop.latest_stats.num_used_pages == 0
    assert loop.latest_stats.num_generated_tokens < 200


async def test_stopping_answers_what_is_open(loop: EngineLoop):
    task = asyncio.ensure_future(loop.generate(request(max_new_tokens=200)))
    await eventually(lambda: loop.latest_stats.num_running == 1)
    await asyncio.to_thread(loop.stop)
    assert (await task).failure == Failure(FailureKind.LEAVING, "the replica is shutting down")
    assert (await loop.generate(request())).failure.kind is FailureKind.LEAVING, "so that another replica goes on"


async def test_a_step_that_hangs_fails_the_health_check():
    config = emulated_config(replicas={"stall_timeout_s": 0.2})
    replica = EngineReplica(config, "replica")
    hangs, goes_on = threading.Event(), threading.Event()

    def hang() -> list[StepOutput]:
        hangs.set()
        goes_on.wait()
        return []

    replica._loop._engine.step = hang
    task = asyncio.ensure_future(replica._loop.generate(request()))
    await eventually(hangs.is_set)
    time.sleep(0.2)
    with pytest.raises(EngineError, match="running for more than"):
        replica.check_health()
    goes_on.set()
    await eventually(lambda: replica._loop.health.busy_since is None)
    replica.check_health()
    task.cancel()
    await asyncio.to_thread(replica.stop)


def test_the_channel_listens_on_loopback_while_the_cluster_has_one_node(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": False}])
    assert channel_host("auto") == "127.0.0.1"
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True}, {"Alive": True}])
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    assert channel_host("auto") == "10.0.0.7"
    assert channel_host("10.0.0.9") == "10.0.0.9"


async def test_suspects_begin_one_after_the_other(loop: EngineLoop):
    """Each once the one before has a token; one that is given up before does not begin, and others do not wait."""
    replies = [asyncio.ensure_future(loop.generate(request(max_new_tokens=40), is_suspect=True)) for _ in range(4)]
    given_up = asyncio.ensure_future(loop.generate(request(), is_suspect=True))
    beside = asyncio.ensure_future(loop.generate(request(max_new_tokens=40)))
    await asyncio.sleep(0)
    given_up.cancel()
    done = await asyncio.gather(*replies, beside)
    assert all(len(reply.token_ids) == 40 for reply in done)
    assert loop.latest_stats.num_running <= 5
    assert not loop._waiting_suspects


async def test_suspects_that_have_not_begun_are_handed_back_unblamed(loop: EngineLoop):
    def explode() -> None:
        time.sleep(0.2)
        raise RuntimeError("broken")

    loop._engine.step = explode
    tried, *waiting = await asyncio.gather(*(loop.generate(request(), is_suspect=True) for _ in range(3)))
    assert tried.failure.kind is FailureKind.FAILED
    assert [reply.failure.kind for reply in waiting] == [FailureKind.DECLINED] * 2


async def test_long_prompts_that_come_together_begin_one_a_step():
    """Whoever runs gets a token between any two of them; short ones that come with the first do not wait."""
    calls: list[str] = []

    class Engine(EmulatedEngine):
        def add_request(self, request: GenerationRequest) -> str:
            calls.append("long" if len(request.prompt_token_ids) > 1000 else "short")
            return super().add_request(request)

        def step(self) -> list[StepOutput]:
            calls.append("step")
            return super().step()

    emulation = EmulationConfig(tokens_per_s=500.0, prefill_tokens_per_s=1e9, max_seq_len=200_000)
    loop = EngineLoop(Engine(EngineConfig(max_batch_size=8, num_pages=40_000), emulation, vocab_size=264), "replica")
    prompts = [(1, 2, 3), (1, 2, 3), *[(i,) * 70_000 for i in range(4)]]
    tasks = [asyncio.ensure_future(loop.generate(request(prompt_token_ids=prompt))) for prompt in prompts]
    await asyncio.sleep(0)
    loop.start()
    replies = await asyncio.gather(*tasks)
    await asyncio.to_thread(loop.stop)
    assert all(len(reply.token_ids) == 10 for reply in replies)
    assert calls[:9] == ["short", "short", "long", "step", "long", "step", "long", "step", "long"]


async def test_an_engine_that_has_lost_a_part_breaks_down_without_a_step_that_fails():
    """While it has nothing to do, too; what holds the other parts is ended."""
    told: list[str] = []

    class Engine(EmulatedEngine):
        lost: str | None = None

        @property
        def failure(self) -> str | None:
            return self.lost

        def close(self) -> None:
            told.append("closed")

    engine = Engine(EngineConfig(max_batch_size=4, num_pages=64), EmulationConfig(max_seq_len=256), vocab_size=264)
    loop = EngineLoop(engine, "replica")
    loop.start()
    assert (await loop.generate(request())).end is not None
    engine.lost = "rank 1 has ended"
    await eventually(lambda: told == ["closed"])
    assert "rank 1 has ended" in loop.health.failure
    reply = await loop.generate(request())
    assert reply.failure.kind is FailureKind.FAILED
    await asyncio.to_thread(loop.stop)
    assert told == ["closed"]
