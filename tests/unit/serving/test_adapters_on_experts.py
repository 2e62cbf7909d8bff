"""Adapters by request on routers and on the experts that these choose among, in whole engines on a CPU."""

import pytest
from small_engines import create_engine, create_model, create_requests
from test_adapters import expected_tokens, ref_to, run, with_adapters

from benchmarks.random_adapter import write_random_adapter
from llm.errors import ConfigError
from llm.serving.schemas import AdapterFailure

MIXTURE = {
    "architecture": "Qwen3MoeForCausalLM", "num_experts": 6, "num_experts_per_token": 2, "expert_size": 24,
    "normalize_expert_weights": True,
}  # fmt: skip
WITH_EXPERTS = {"max_adapters": 3, "adapter_experts": True}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A model, requests with three adapters and without one, and what each gives alone."""
    model, directory = create_model(**MIXTURE), tmp_path_factory.mktemp("adapters")
    adapters = []
    for rank in (2, 5, 16):
        path = directory / str(rank)
        write_random_adapter(model.config, path, rank=rank, seed=rank, std=0.3 / rank**0.25, with_experts=True)
        adapters.append(ref_to(path))
    adapters = [*adapters, None, adapters[0]]
    requests = with_adapters(create_requests(5, max_new_tokens=32, temperature=0.0), adapters)
    expected = [expected_tokens(model, request) for request in requests]
    assert len(set(expected)) == len(expected)
    return model, requests, expected


@pytest.mark.parametrize(
    "config",
    [{"max_tokens_per_step": 8}, {"num_pages": 30}, {"max_adapters": 1}],
    ids=["chunked", "preempted", "fewer slots than adapters"],
)
def test_each_request_equals_its_merged_model(mixed, config):
    model, requests, expected = mixed
    engine = create_engine(model, **{**WITH_EXPERTS, **config})
    assert run(engine, requests) == expected
    assert (engine.stats().num_preemptions > 0) is ("num_pages" in config)
    again = [request.model_copy(update={"request_id": f"again {i}"}) for i, request in enumerate(requests)]
    assert run(engine, again) == expected
    assert engine.stats().num_cached_prompt_tokens > 0
    resumed = [
        request.model_copy(update={"request_id": f"resumed {i}", "output_token_ids": tokens[:7]})
        for i, (request, tokens) in enumerate(zip(requests, expected, strict=True))
    ]
    assert run(engine, resumed) == [tokens[7:] for tokens in expected]
    engine.close()


def test_an_engine_without_room_for_experts_refuses_their_adapters_alone(mixed):
    """The message names the setting; the model itself, and adapters on other projections, are served."""
    model, requests, expected = mixed
    engine = create_engine(model, max_adapters=2)
    results = engine.generate(requests[2:4], progress=False)
    assert "set adapter_experts: true" in results[0].error
    assert results[0].adapter_failure is AdapterFailure.UNREADABLE
    assert (results[1].token_ids, results[1].error) == (expected[3], None)
    engine.close()


def test_memory_that_experts_take_is_told(mixed):
    """By what to change, in pools and in host memory."""
    model = mixed[0]
    with pytest.raises(ConfigError, match=r"max_adapter_rank with adapter_experts [0-9]+"):
        create_engine(model, max_adapters=512, max_adapter_rank=256, adapter_experts=True, cpu_pool_bytes=1 << 20)
    with pytest.raises(ConfigError, match="lower max_adapter_rank, or leave out adapter_experts"):
        create_engine(model, **WITH_EXPERTS, adapter_host_gib=1e-5)
