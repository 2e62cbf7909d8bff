"""Layers that keep a state by row: whatever happens to a sequence, its state is that of its own tokens."""

import logging
from functools import cache

import pytest
import torch
from small_engines import (
    SAMPLING,
    check_idle,
    create_engine,
    create_model,
    create_requests,
    run_alone,
)

from llm.config import DeltaConfig, EngineConfig, ModelConfig
from llm.core.kv_cache import KVCache, reset_all_caches
from llm.errors import CapacityError, ConfigError
from llm.models.decoder import DecoderModel
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

DELTA = {"layers": (0, 2), "num_key_heads": 2, "num_value_heads": 4, "key_dim": 8, "value_dim": 12, "kernel_size": 3}
SHAPE = {
    "architecture": "Qwen3_5ForCausalLM", "num_layers": 3, "delta": DELTA, "norm_offset": 1.0, "qk_norm": True,
    "attention_gate": True, "partial_rotary_factor": 0.5,
}  # fmt: skip

CONFIGS: dict[str, dict[str, int]] = {
    "batched": {"max_batch_size": 3},
    "chunked": {"max_batch_size": 3, "max_tokens_per_step": 8},
    "preempted": {"max_batch_size": 5, "max_tokens_per_step": 16, "num_pages": 24, "max_seq_len": 80},
    "one snapshot": {"max_batch_size": 5, "max_tokens_per_step": 16, "num_state_snapshots": 1},
    "no snapshots": {"max_batch_size": 3, "num_state_snapshots": 0},
}


@cache
def model() -> DecoderModel:
    made = create_model(**SHAPE)
    for name, parameter in made.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            torch.nn.init.uniform_(parameter, -2, 0)
    return made


@cache
def tokens_alone(sampling_name: str) -> list[tuple[int, ...]]:
    return [run_alone(request, model()).token_ids for request in create_requests(**SAMPLING[sampling_name])]


@torch.inference_mode()
def test_greedy_equals_the_model_itself():
    """The engine says what argmax over a full recomputation says, token for token."""
    for request, made in zip(create_requests(temperature=0.0), tokens_alone("greedy"), strict=True):
        tokens = list(request.prompt_token_ids)
        for _ in range(request.max_new_tokens):
            tokens.append(int(model()(tokens)[0, -1].argmax()))
        assert made == tuple(tokens[len(request.prompt_token_ids) :])


@pytest.mark.parametrize(
    ("config", "sampling_name", "max_steps_ahead"),
    [
        (config, sampling_name, (row + column) % 2)
        for row, config in enumerate(CONFIGS)
        for column, sampling_name in enumerate(("greedy", "sampled"))
    ],
)
def test_batched_equals_alone(config, sampling_name, max_steps_ahead):
    """More requests than rows, so that rows change hands; chunks; preemption, after which a state begins anew.

    The second time prompts begin from snapshots, which few steps in flight still write to.
    """
    requests = create_requests(**SAMPLING[sampling_name])
    engine = create_engine(model(), max_steps_ahead=max_steps_ahead, **CONFIGS[config])
    for _ in range(2):
        results = engine.generate(requests, progress=False)
        assert [result.token_ids for result in results] == tokens_alone(sampling_name)
        check_idle(engine)
    if config in ("batched", "chunked", "no snapshots"):  # elsewhere it depends on what has been given up
        assert (engine.stats().num_cached_prompt_tokens > 0) is (config != "no snapshots")
    assert (engine.stats().num_preemptions > 0) is (config == "preempted")


def test_resumed_equals_uninterrupted():
    """On another replica, with what was generated so far."""
    request, tokens = create_requests(temperature=0.0)[3], tokens_alone("greedy")[3]
    rest = request.model_copy(update={"output_token_ids": tokens[:9]})
    assert run_alone(rest, model()).token_ids == tokens[9:]


@torch.inference_mode()
def test_caches_of_the_library():
    """Chunks go on where the last one ended, reset begins anew; what a cache cannot hold is refused."""
    ids = torch.tensor([create_requests()[5].prompt_token_ids] * 2)
    whole = model()(ids)
    caches = model().make_kv_caches(2)
    for _ in range(2):
        parts = [model()(part, kv_caches=caches, use_cache=True) for part in ids.split(9, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)
        with pytest.raises(CapacityError, match="batch of 1 sequences after one of 2"):
            model()(ids[:1], kv_caches=caches, use_cache=True)
        reset_all_caches(caches)
    with pytest.raises(CapacityError, match="holds max_batch_size=2"):
        model()(ids.repeat(2, 1), kv_caches=caches, use_cache=True)
    plain = KVCache.from_model_config(2, 64, 3, 2, 8)
    with pytest.raises(ValueError, match="use make_kv_caches"):
        model()(ids, kv_caches=plain, use_cache=True)


def test_gradients_reach_every_parameter():
    """The library trains through it."""
    trained = create_model(**SHAPE)
    trained(list(range(12))).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.parameters())


def test_a_prefix_is_found_as_far_as_there_is_a_snapshot():
    """The first of three prompts that begin alike leaves one behind its own end, the second where they part."""
    generator = torch.Generator().manual_seed(3)
    shared, *ends = (torch.randint(0, 48, (n,), generator=generator).tolist() for n in (22, 9, 30, 13))
    requests = [GenerationRequest(prompt_token_ids=(*shared, *end), max_new_tokens=6, temperature=0) for end in ends]
    expected = [run_alone(request, model()).token_ids for request in requests]
    engine, cached = create_engine(model()), []
    for request in [*requests, requests[1]]:
        before = engine.stats().num_cached_prompt_tokens
        again = request.model_copy(update={"request_id": str(len(cached))})
        result = engine.generate([again], progress=False)[0]
        assert result.token_ids == expected[requests.index(request)]
        cached.append(engine.stats().num_cached_prompt_tokens - before)
    assert cached == [0, 0, 20, 48]


def test_what_goes_without_is_said_once(caplog):
    with caplog.at_level(logging.INFO, "llm"):
        create_engine(model())
        assert not any("without a prefix cache" in record.message for record in caplog.records)
        create_engine(model(), num_state_snapshots=0)
    assert sum("without a prefix cache" in record.message for record in caplog.records) == 1
    with pytest.raises(ConfigError, match=r"num_speculative_tokens: 4: .* cannot take back"):
        create_engine(model(), num_speculative_tokens=4)


def test_states_count_in_the_memory_of_the_pool():
    """Those of 4 rows, of the one of nobody, and of snapshots; without room for a page the message names them."""
    state = model().config.state_bytes(4)
    assert state == 2 * (2 * (2 * 2 * 8 + 48) * 4 + 4 * 12 * 8 * 4)
    config = {"max_batch_size": 4, "max_seq_len": 128, "max_tokens_per_step": 8}
    page = 2 * 16 * 2 * 8 * 4
    for num_states, changes in (
        (13, {}),
        (8, {"num_state_snapshots": 3}),
        (5, {"num_state_snapshots": 0}),
        (5, {"enable_prefix_caching": False}),
    ):
        room = num_states * state + 7 * page + 100
        engine = ContinuousBatchingEngine(model(), config=EngineConfig(**config, **changes, cpu_pool_bytes=room))
        assert engine.scheduler.pool.num_pages == 7
    with pytest.raises(ConfigError, match=f"the states of each row and snapshot {state} .lower max_batch_size"):
        ContinuousBatchingEngine(model(), config=EngineConfig(**config, cpu_pool_bytes=13 * state + page - 1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": (0, 1, 2)}, "at least one must have attention"),
        ({"layers": (0, 3)}, "past num_layers"),
        ({"layers": (0, 0)}, "twice"),
        ({"num_value_heads": 3}, "not a multiple"),
    ],
)
def test_shapes_that_cannot_be(changes, reason):
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**{**SHAPE, "delta": DeltaConfig(**{**DELTA, **changes})})


def test_a_row_forgets_a_sequence_that_was_given_up():
    """Who comes after one that ended in the middle of its prompt finds nothing of it."""
    engine = create_engine(model(), max_batch_size=1, max_tokens_per_step=8)
    long, request = create_requests(temperature=0.0)[5], create_requests(temperature=0.0)[2]
    engine.add_request(long)
    engine.step()
    engine.abort(long.request_id)
    result = engine.generate([GenerationRequest(**request.model_dump())], progress=False)[0]
    assert result.token_ids == tokens_alone("greedy")[2]
