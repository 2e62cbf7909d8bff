"""Ours = transformers: logits and greedy tokens of every architecture, on small random checkpoints."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from llm.checkpoint.loading import load_decoder
from llm.config import EngineConfig
from llm.core.kv_cache import KVCache
from llm.models.decoder import DecoderModel
from llm.models.registry import CLASSIFIERS, FAMILIES
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

NUM_GREEDY = 64
# Longer than every window and every original_max_position_embeddings of the checkpoints.
PROMPT_LENS = [1, 7, 70, 150]

KINDS = [
    "deepseek_v2",
    "deepseek_v2_groups",
    "deepseek_v3",
    "deepseek_v3_halves",
    "gemma2",
    "gemma3",
    "gemma3_untied",
    "gemma3_text_half",
    "glm4_moe",
    "glm4_moe_groups",
    "glm4_moe_lite",
    "gpt_oss",
    "gpt_oss_plain",
    "llama",
    "llama_mha",
    "llama_mqa_biases",
    "llama_llama3",
    "llama_linear",
    "llama_yarn",
    "llama_yarn_mscale",
    "mistral",
    "mistral_window",
    "ministral",
    "ministral3",
    "mistral3_text_half",
    "mixtral",
    "phi3",
    "phi3_partial",
    "phi3_longrope",
    "phi3_window",
    "qwen2",
    "qwen2_tied",
    "qwen2_window",
    "qwen2_yarn",
    "qwen3",
    "qwen3_5",
    "qwen3_5_images",
    "qwen3_5_moe",
    "qwen3_5_moe_images",
    "qwen3_5_tied",
    "qwen3_tied",
    "qwen3_moe",
    "qwen3_moe_dense",
    "qwen3_next",
    "qwen3_next_dense",
]


def prompt(length: int, batch_size: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 199, (batch_size, length), generator=generator)


def greedy_of_ours(model: DecoderModel, prompt_ids: torch.Tensor, caches: list[KVCache]) -> list[int]:
    tokens: list[int] = []
    ids = prompt_ids
    for _ in range(NUM_GREEDY):
        ids = model(ids, kv_caches=caches, use_cache=True)[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


@pytest.fixture(scope="module")
def ours(checkpoints):
    """`kind` to our model, loaded once: to load it anew for each test took a fifth of their time."""
    return cache(lambda kind: load(checkpoints(kind)[0]))


@pytest.fixture(scope="module")
def cached_greedy(ours):
    """`(kind, prompt length)` to our greedy tokens with the model's own caches, end-of-sequence ids ignored."""

    @cache
    def tokens_of(kind: str, length: int) -> list[int]:
        model = ours(kind)
        return greedy_of_ours(model, prompt(length), model.make_kv_caches(1))

    return tokens_of


@pytest.fixture(scope="module")
def greedy_of_transformers(checkpoints, cached_greedy):
    """`(kind, prompt length)` to transformers' greedy tokens, end-of-sequence ids ignored.

    One pass over the prompt and our tokens says which token transformers finds likeliest behind each of them. These are
    its greedy tokens up to the first that is not ours, and there every comparison fails.
    """

    @cache
    def tokens_of(kind: str, length: int) -> list[int]:
        model: PreTrainedModel = checkpoints(kind)[1]
        ids = torch.cat([prompt(length), torch.tensor([cached_greedy(kind, length)[:-1]])], dim=1)
        likeliest: list[int] = model(ids, use_cache=False).logits[0, length - 1 :].argmax(-1).tolist()
        return likeliest

    return tokens_of


def load(directory: Path) -> DecoderModel:
    return load_decoder(directory, progress=False)


def test_every_architecture_is_tested(checkpoints):
    assert {checkpoints(kind)[1].config.architectures[0] for kind in KINDS} == FAMILIES.keys() - CLASSIFIERS.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", PROMPT_LENS)
@torch.inference_mode()
def test_logits_equal(checkpoints, ours, kind, length):
    """Within 1e-4 in float32, for a batch of two."""
    ids = prompt(length, batch_size=2)
    expected = checkpoints(kind)[1](ids, use_cache=False).logits
    torch.testing.assert_close(ours(kind)(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [5, 90])
@torch.inference_mode()
def test_greedy_tokens_with_caches_equal(ours, greedy_of_transformers, cached_greedy, kind, length):
    """64 tokens, with the guide's plain caches and with the model's own windowed ones."""
    model = ours(kind)
    expected = greedy_of_transformers(kind, length)
    assert len(set(expected)) > 8, "a random model that repeats itself proves little"
    assert cached_greedy(kind, length) == expected
    if model.delta_specs:
        return  # no plain cache holds what such a layer keeps
    plain = KVCache.from_model_config(1, 256, model.num_layers, model.num_kv_heads, model.config.head_size)
    assert greedy_of_ours(model, prompt(length), plain) == expected


def greedy_requests(lengths: tuple[int, ...]) -> list[GenerationRequest]:
    """For as many tokens of the engine as `greedy_of_transformers` has."""
    return [
        GenerationRequest(
            prompt_token_ids=tuple(prompt(length)[0].tolist()),
            max_new_tokens=NUM_GREEDY,
            temperature=0,
            ignore_eos=True,
        )
        for length in lengths
    ]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_greedy_tokens_of_the_engine_equal_alone_and_in_a_mixed_batch(ours, greedy_of_transformers, kind):
    """64 tokens each: two prompts together, the third alone when they are done, and a long one alone from the start."""
    lengths = (5, 90, 1)
    expected = [greedy_of_transformers(kind, length) for length in lengths]
    requests = greedy_requests(lengths)
    engine = ContinuousBatchingEngine(ours(kind), max_batch_size=2, max_seq_len=256)
    together = engine.generate(requests, progress=False)
    assert [list(result.token_ids) for result in together] == expected
    fresh = ContinuousBatchingEngine(ours(kind), max_batch_size=4, max_seq_len=256)
    alone = fresh.generate([requests[1].model_copy(update={"request_id": "alone"})], progress=False)
    assert list(alone[0].token_ids) == expected[1]


@pytest.mark.parametrize(
    ("kind", "num_pages"),
    [("qwen3_moe", 14), ("qwen3_5", 14), ("qwen3_5_moe", 14), ("qwen3_next", 14), ("gemma2", 26), ("gemma3", 34),
     ("gpt_oss", 26), ("glm4_moe", 14), ("deepseek_v3", 14)],
)  # fmt: skip
@torch.inference_mode()
def test_greedy_tokens_of_the_engine_survive_whatever_happens(ours, greedy_of_transformers, kind, num_pages):
    """64 tokens each: in chunks, preempted, from the prefix cache, and resumed from a part of the output."""
    lengths = (90, 17, 5)
    expected = [greedy_of_transformers(kind, length) for length in lengths]
    requests = greedy_requests(lengths)
    config = EngineConfig(max_batch_size=3, max_seq_len=256, max_tokens_per_step=24, num_pages=num_pages)
    model = ours(kind)
    small = ContinuousBatchingEngine(model, config=config)
    assert [list(result.token_ids) for result in small.generate(requests, progress=False)] == expected
    assert small.stats().num_preemptions > 0
    # Pages that windows have left behind stay in the cache where there is room.
    engine = ContinuousBatchingEngine(model, config=config.model_copy(update={"num_pages": 200}))
    assert [list(result.token_ids) for result in engine.generate(requests, progress=False)] == expected
    again = [
        request.model_copy(update={"request_id": str(i), "output_token_ids": tuple(tokens[: 7 * i])})
        for i, (request, tokens) in enumerate(zip(requests, expected, strict=True))
    ]
    num_cached = engine.stats().num_cached_prompt_tokens
    results = engine.generate(again, progress=False)
    assert [list(result.token_ids) for result in results] == [tokens[7 * i :] for i, tokens in enumerate(expected)]
    assert engine.stats().num_cached_prompt_tokens > num_cached


@torch.inference_mode()
def test_longrope_goes_by_the_longest_sequence_that_there_may_be(checkpoints, greedy_of_transformers):
    """transformers chooses the angles by the sequence: those of longer ones count where the context is longer."""
    directory, theirs = checkpoints("phi3_longrope_long")
    ours = load(directory)
    for length in (70, 150):
        ids = prompt(length)
        torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits, atol=1e-4, rtol=0)
    long = GenerationRequest(
        prompt_token_ids=tuple(prompt(90)[0].tolist()), max_new_tokens=NUM_GREEDY, temperature=0, ignore_eos=True
    )
    short = GenerationRequest(
        prompt_token_ids=tuple(prompt(5)[0].tolist()), max_new_tokens=25, temperature=0, ignore_eos=True
    )
    engine = ContinuousBatchingEngine(ours, max_batch_size=2, max_seq_len=256)
    assert list(engine.generate([long], progress=False)[0].token_ids) == greedy_of_transformers(
        "phi3_longrope_long", 90
    )
    engine = ContinuousBatchingEngine(ours, max_batch_size=2, max_seq_len=32)
    tokens = list(engine.generate([short], progress=False)[0].token_ids)
    ids = torch.cat([prompt(5), torch.tensor([tokens[:-1]])], dim=1)
    assert theirs(ids, use_cache=False).logits[0, 4:].argmax(-1).tolist() == tokens
    assert len(tokens) == 25


@pytest.mark.parametrize("kind", ["llama", "qwen2_tied"])
@torch.inference_mode()
def test_half_precision_checkpoints_and_targets(checkpoints, tmp_path, kind):
    """A bfloat16 checkpoint loads to float32 exactly, a float32 one to bfloat16 as torch rounds."""
    directory, theirs = checkpoints(kind)
    rounded = load_decoder(directory, dtype=torch.bfloat16, progress=False)
    assert rounded.dtype == torch.bfloat16
    expected = theirs.model.embed_tokens.weight.to(torch.bfloat16)
    assert torch.equal(rounded.embed_tokens.weight, expected)
    half = type(theirs)(theirs.config)
    half.load_state_dict(theirs.state_dict())
    half.to(torch.bfloat16).save_pretrained(tmp_path)
    wide = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)
    ids = prompt(30)
    torch.testing.assert_close(load(tmp_path)(ids), wide(ids).logits, atol=1e-4, rtol=0)
