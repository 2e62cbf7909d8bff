"""Adapters by request: each request equals a model with its adapter merged, whatever runs beside it."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from small_engines import VOCAB_SIZE, create_engine, create_model, create_requests, each_depth, run_steps, tokens_of

from benchmarks.random_adapter import write_random_adapter
from llm.checkpoint.adapter import load_lora
from llm.checkpoint.adapter_digest import adapter_digest
from llm.errors import ConfigError, InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import AdapterFailure, AdapterRef, FinishReason, GenerationRequest, Pooling

RANKS = 1, 3, 4, 8, 16, 5, 2, 7


def write_adapters(model: DecoderModel, directory: Path, ranks: tuple[int, ...] = RANKS) -> list[AdapterRef]:
    """Adapters that change what is drawn, of different ranks, named by their place in the list."""
    refs = []
    for i, rank in enumerate(ranks):
        write_random_adapter(model.config, directory / str(i), rank=rank, seed=i, std=0.3 / rank**0.25)
        refs.append(ref_to(directory / str(i)))
    return refs


def ref_to(path: Path) -> AdapterRef:
    return AdapterRef(name=f"adapter {path.name}", path=str(path), digest=adapter_digest(path))


def merged(model: DecoderModel, adapter: AdapterRef | None) -> DecoderModel:
    """The oracle: a model of its own with the adapter merged."""
    own = copy.deepcopy(model)
    if adapter is not None:
        load_lora(own, adapter.path)
        own.merge_lora()
    return own


def with_adapters(requests: list[GenerationRequest], adapters: list[AdapterRef | None]) -> list[GenerationRequest]:
    return [
        request.model_copy(update={"adapter": adapter}) for request, adapter in zip(requests, adapters, strict=True)
    ]


def expected_tokens(model: DecoderModel, request: GenerationRequest) -> tuple[int, ...]:
    """What the merged model gives alone."""
    engine = create_engine(merged(model, request.adapter), enable_prefix_caching=False, max_tokens_per_step=256)
    return engine.generate([request.model_copy(update={"adapter": None})], progress=False)[0].token_ids


def run(engine: ContinuousBatchingEngine, requests: list[GenerationRequest]) -> list[tuple[int, ...]]:
    for request in requests:
        engine.add_request(request)
    pool = engine._adapters
    outputs = run_steps(engine, pool.check)
    assert {output.error for output in outputs} == {None}
    return [tokens_of(outputs, request) for request in requests]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[DecoderModel, list[GenerationRequest], list[tuple[int, ...]]]:
    """A model, requests with eight adapters and without, and what each gives alone: 64 greedy tokens."""
    model = create_model()
    adapters = [*write_adapters(model, tmp_path_factory.mktemp("adapters")), None, None]
    requests = with_adapters(create_requests(10, max_new_tokens=64, temperature=0.0), adapters)
    expected = [expected_tokens(model, request) for request in requests]
    assert len(set(expected)) == len(expected)
    return model, requests, expected


@each_depth
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_tokens_per_step": 8},
        {"num_pages": 44},
        {"max_adapters": 2},
        {"num_speculative_tokens": 3, "enable_prefix_caching": False},
    ],
    ids=["mixed", "chunked", "preempted", "fewer slots than adapters", "with guesses"],
)
def test_each_request_equals_its_merged_model(mixed, config, max_steps_ahead):
    model, requests, expected = mixed
    engine = create_engine(model, max_steps_ahead=max_steps_ahead, **{"max_adapters": 8, **config})
    assert run(engine, requests) == expected
    assert (engine.stats().num_preemptions > 0) is ("num_pages" in config)
    assert (engine.stats().num_accepted_tokens > 0) is ("num_speculative_tokens" in config)
    engine.close()


def test_logits_equal_the_merged_model(tmp_path):
    """Within 1e-4 in float32: log probabilities of prompts and of what is drawn, and vectors."""
    model = create_model()
    adapters = [*write_adapters(model, tmp_path, RANKS[:3]), None]
    params = {"prompt_logprobs": 3, "logprobs": 3, "max_new_tokens": 5}
    requests = with_adapters(create_requests(4, **params), adapters)
    requests += with_adapters(create_requests(4, pooling=Pooling.MEAN), adapters)
    engine = create_engine(model, max_adapters=3)
    for result, request in zip(engine.generate(requests, progress=False), requests, strict=True):
        alone = create_engine(merged(model, request.adapter))
        (oracle,) = alone.generate([request.model_copy(update={"adapter": None})], progress=False)
        assert result.token_ids == oracle.token_ids
        if request.pooling is not None:
            ours, theirs = (torch.frombuffer(bytearray(each.vector), dtype=torch.float32) for each in (result, oracle))
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
            continue
        for ours, theirs in ((result.logprobs, oracle.logprobs), (result.prompt_logprobs, oracle.prompt_logprobs)):
            values = [[torch.tensor([entry.logprob for entry in each])] for each in (ours, theirs)]
            torch.testing.assert_close(*values, atol=1e-4, rtol=0)
    engine.close()


def test_a_resumed_request_goes_on_with_its_adapter(tmp_path):
    model = create_model()
    (adapter,) = write_adapters(model, tmp_path, (4,))
    (request,) = with_adapters(create_requests(1, max_new_tokens=20, temperature=0.8), [adapter])
    expected = expected_tokens(model, request)
    engine = create_engine(model, max_adapters=1)
    resumed = request.model_copy(update={"request_id": "again", "output_token_ids": expected[:7]})
    assert run(engine, [resumed]) == [expected[7:]]
    engine.close()


def test_pages_are_shared_within_an_adapter_only(tmp_path):
    """The same prompt for two adapters and the model itself, twice: only the second time is anything cached."""
    model = create_model()
    adapters = [*write_adapters(model, tmp_path, (4, 8)), None]
    prompt = tuple(int(i) for i in torch.randint(0, VOCAB_SIZE, (30,), generator=torch.Generator().manual_seed(3)))
    engine = create_engine(model, max_adapters=2)
    for is_cached in (False, True):
        for adapter in adapters:
            request = GenerationRequest(prompt_token_ids=prompt, max_new_tokens=9, temperature=0.0, adapter=adapter)
            (result,) = engine.generate([request], progress=False)
            assert result.token_ids == expected_tokens(model, request)
            assert (result.num_cached_tokens > 0) is is_cached
    engine.close()


def test_salts_cannot_name_another_adapters_pages():
    """A request without an adapter cannot have a salt that gives it an adapter's pages."""
    ref = AdapterRef(name="a", path="/a", digest="d")
    salts = ["", "d", "\xffd\xff", "ÿdÿ"]
    names = {
        GenerationRequest(prompt="x", cache_salt=salt, adapter=adapter).page_salt
        for salt in salts
        for adapter in (None, ref)
    }
    assert len(names) == 2 * len(set(salts))


def test_adapters_rotate_and_are_given_up(tmp_path):
    """Many adapters through few slots and few places, aborted at random: all others end as expected, none is lost."""
    model = create_model()
    refs = write_adapters(model, tmp_path, (2,) * 12)
    generator = torch.Generator().manual_seed(5)
    requests = []
    for i in range(60):
        which = int(torch.randint(-2, len(refs), (1,), generator=generator))
        prompt = tuple(torch.randint(0, VOCAB_SIZE, (1 + i % 9,), generator=generator).tolist())
        requests.append(
            GenerationRequest(
                prompt_token_ids=prompt, max_new_tokens=1 + i % 13, temperature=0.0, adapter=refs[which] if which >= 0
                else None,
            )
        )  # fmt: skip
    aborted = requests[3::7]
    engine = create_engine(model, max_adapters=3, max_batch_size=5, adapter_host_gib=place_gib(model, 5))
    outputs, rest = [], list(requests)
    pool = engine._adapters
    while rest or engine.scheduler.has_pending_work:
        for _ in range(int(torch.randint(0, 4, (1,), generator=generator))):
            if rest:
                engine.add_request(rest.pop(0))
        for request in aborted:
            if int(torch.randint(0, 5, (1,), generator=generator)) == 0:
                engine.abort(request.request_id)
        outputs += engine.step()
        pool.check()
        assert len(pool._slots) <= 3
    by_adapter = {
        request.adapter.digest if request.adapter else None: merged(model, request.adapter) for request in requests
    }
    for request in requests:
        own = by_adapter[request.adapter.digest if request.adapter else None]
        (oracle,) = create_engine(own).generate([request.model_copy(update={"adapter": None})], progress=False)
        found = tokens_of(outputs, request)
        assert found == oracle.token_ids[: len(found)]
        assert len(found) == len(oracle.token_ids) or request in aborted
    assert not pool._num_users
    assert len(engine.stats().adapters) <= 5 + 3
    engine.close()


def place_gib(model: DecoderModel, num_places: int) -> float:
    """Memory for so many adapters."""
    engine = create_engine(model, max_adapters=1)
    size = engine.runner.adapters.slots.shape[1] * 4
    engine.close()
    return (num_places * size + 1) / (1 << 30)


def test_an_adapter_that_cannot_be_read_ends_its_requests_alone(tmp_path):
    """Missing, damaged, too large, or not finite in the model's format; the next try may succeed."""
    model = create_model()
    good, damaged, large, infinite = write_adapters(model, tmp_path, (4, 4, 32, 4))
    (Path(damaged.path) / "adapter_model.safetensors").write_bytes(b"no")
    write_random_adapter(model.config, Path(infinite.path), rank=4, std=float("inf"))
    missing = AdapterRef(name="gone", path=str(tmp_path / "gone"), digest="gone")
    adapters = [good, damaged, large, infinite, missing, missing, None]
    requests = with_adapters(create_requests(7, max_new_tokens=6, temperature=0.0), adapters)
    engine = create_engine(model, max_adapters=2, max_adapter_rank=16)
    results = engine.generate(requests, progress=False)
    for result, request, reason in zip(
        results, requests, [None, "damaged", "max_adapter_rank 16", "not finite", *["is missing"] * 2, None],
        strict=True,
    ):  # fmt: skip
        if reason is None:
            assert result.token_ids == expected_tokens(model, request)
        else:
            assert (result.finish_reason, result.adapter_failure) == (FinishReason.ERROR, AdapterFailure.UNREADABLE)
            assert reason in result.error
            assert "\n" not in result.error
    engine._adapters.check()
    write_random_adapter(model.config, Path(missing.path), rank=4, std=0.2)
    again = requests[4].model_copy(update={"request_id": "again", "adapter": ref_to(Path(missing.path))})
    assert engine.generate([again], progress=False)[0].token_ids == expected_tokens(model, again)
    engine.close()


def test_others_go_on_while_an_adapter_is_read(tmp_path, monkeypatch):
    """A file that takes long to read holds up nobody else, and a request may leave meanwhile."""
    model = create_model()
    (adapter,) = write_adapters(model, tmp_path, (4,))
    engine = create_engine(model, max_adapters=1)
    may_read = threading.Event()
    read = engine._adapters._copies._packer.read

    def read_late(*args):
        assert may_read.wait(60)
        return read(*args)

    monkeypatch.setattr(engine._adapters._copies._packer, "read", read_late)
    waiting, leaving, other = with_adapters(create_requests(3, max_new_tokens=8), [adapter, adapter, None])
    for request in (waiting, leaving, other):
        engine.add_request(request)
    outputs = []
    while not any(output.finish_reason for output in outputs):
        outputs += engine.step()
    assert {output.request_id for output in outputs} == {other.request_id}
    assert engine.stats().num_waiting == 2
    assert engine.abort(leaving.request_id)
    may_read.set()
    outputs = run_steps(engine)
    assert tokens_of(outputs, waiting) == expected_tokens(model, waiting)
    assert tokens_of(outputs, leaving) == ()
    assert engine.stats().adapters == (adapter.digest,)
    engine.close()


def test_requests_for_held_adapters_do_not_pass_one_that_waits_for_ever(tmp_path):
    """A single slot whose adapter is always wanted: the other adapter's request still gets its turn."""
    model = create_model()
    popular, other = write_adapters(model, tmp_path, (2, 2))
    engine = create_engine(model, max_adapters=1)
    prompt = {"prompt_token_ids": (1, 2, 3), "max_new_tokens": 6}
    patient = GenerationRequest(**prompt, adapter=other)
    engine.add_request(GenerationRequest(**prompt, adapter=popular))
    while not engine.scheduler.num_running:
        engine.step()
    engine.add_request(patient)
    for _ in range(1000):
        engine.add_request(GenerationRequest(**prompt, adapter=popular))
        if any(output.request_id == patient.request_id for output in engine.step()):
            break
    else:
        pytest.fail("it never ran")
    engine.close()


def test_an_adapter_is_unloaded_once_no_request_needs_it(tmp_path):
    model = create_model()
    first, second = write_adapters(model, tmp_path, (2, 4))
    engine = create_engine(model, max_adapters=2)
    requests = with_adapters(create_requests(2, max_new_tokens=10, temperature=0.0), [first, second])
    for request in requests:
        engine.add_request(request)
    while engine.scheduler.num_running < 2:
        engine.step()
    assert set(engine.stats().adapters) == {first.digest, second.digest}
    assert engine.unload_adapter(first.digest)
    assert first.digest in engine.stats().adapters
    outputs = run_steps(engine)
    assert engine.stats().adapters == (second.digest,)
    assert not engine.unload_adapter(first.digest)
    assert engine.unload_adapter(second.digest)
    assert engine.stats().adapters == ()
    assert len(outputs) > 0
    again = requests[0].model_copy(update={"request_id": "again"})
    assert engine.generate([again], progress=False)[0].token_ids == expected_tokens(model, again)
    engine.close()


def test_changed_files_are_never_run(tmp_path):
    """A digest names what a request began with: other weights under its path do not answer it."""
    model = create_model()
    (adapter,) = write_adapters(model, tmp_path, (2,))
    write_random_adapter(model.config, Path(adapter.path), rank=2, seed=99)
    engine = create_engine(model, max_adapters=1)
    (request,) = with_adapters(create_requests(1), [adapter])
    (result,) = engine.generate([request], progress=False)
    assert (result.token_ids, result.adapter_failure) == ((), AdapterFailure.CHANGED)
    assert "have changed" in result.error
    assert engine.stats().adapters == ()
    engine.close()


def test_what_an_engine_cannot_do_with_adapters_is_refused(tmp_path):
    model = create_model()
    (adapter,) = write_adapters(model, tmp_path, (2,))
    request = GenerationRequest(prompt_token_ids=(1,), adapter=adapter)
    with pytest.raises(InvalidRequestError, match="set max_adapters"):
        create_engine(model).add_request(request)
    with pytest.raises(ConfigError, match="adapter_host_gib"):
        create_engine(model, max_adapters=1, adapter_host_gib=1e-9)
    with pytest.raises(ConfigError, match="max_adapters adapters of max_adapter_rank"):
        create_engine(model, max_adapters=2, cpu_pool_bytes=1 << 16)
