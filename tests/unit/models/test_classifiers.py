"""Classifiers = transformers' `AutoModelForSequenceClassification`: logits of labels of every class, on small random
checkpoints, however the engine schedules them. The kernels run in Triton's interpreter where there is no GPU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_layouts import awq, packed, quantize_directory, transformers_fp8_by_tensor
from safetensors.torch import load_file, save_file
from thread_ranks import parallel_engine
from transformers import PreTrainedModel

from benchmarks.random_adapter import write_random_adapter
from llm.checkpoint.adapter import load_lora
from llm.checkpoint.adapter_digest import adapter_digest
from llm.checkpoint.loading import check_checkpoint, load_decoder
from llm.config import EngineConfig
from llm.errors import CheckpointError, ConfigError, InvalidRequestError
from llm.models.registry import CLASSIFIERS
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import AdapterRef, GenerationRequest, Pooling

CLOSE = 1e-4
LENGTHS = [1, 70, 7, 150, 60, 33]
PAD = 5
SIZES = {"max_batch_size": 4, "page_size": 4, "attention_backend": "reference"}
KINDS = [
    "deepseek_v2", "deepseek_v3", "gemma2", "gemma3", "gemma3_text_half", "gpt_oss", "llama", "ministral",
    "ministral3", "mistral_window", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_tied", "qwen3_moe", "qwen3_next",
    "qwen3_5_images",
]  # fmt: skip


def create_prompts(lengths: Sequence[int] = LENGTHS) -> list[tuple[int, ...]]:
    """The longer ones begin alike, so that the prefix cache has something to find; none holds `PAD`."""
    ids = torch.randint(6, 199, (max(lengths),), generator=torch.Generator().manual_seed(3)).tolist()
    return [tuple(ids[:length]) if length > 40 else tuple(reversed(ids[:length])) for length in lengths]


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """The oracle: each prompt alone in one pass."""
    return np.concatenate([model(torch.tensor([list(prompt)])).logits.float().numpy() for prompt in prompts])


def make_engine(directory: Path, **options: object) -> ContinuousBatchingEngine:
    model = load_decoder(directory, progress=False)
    return ContinuousBatchingEngine(model, config=EngineConfig(**{**SIZES, **options}))


def check_logits(engine: ContinuousBatchingEngine, model: PreTrainedModel, prompts: list[tuple[int, ...]]) -> None:
    found = engine.classify(prompts, progress=False)
    engine.scheduler.check()
    np.testing.assert_allclose(found, expected_logits(model, prompts), atol=CLOSE, rtol=0)


def test_every_class_is_tested(checkpoints):
    assert {checkpoints(kind, num_labels=3)[1].config.architectures[0] for kind in KINDS} == CLASSIFIERS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(checkpoints, kind):
    """Alone; in a batch; in chunks of 16; and once more with what the prefix cache holds."""
    directory, model = checkpoints(kind, num_labels=3)
    prompts = create_prompts()
    assert np.ptp(expected_logits(model, prompts), axis=0).min() > 0.1, "or they would say nothing"
    check_logits(make_engine(directory, max_batch_size=1), model, prompts[:3])
    for budget in (256, 16):
        engine = make_engine(directory, max_tokens_per_step=budget)
        for _ in range(2):
            check_logits(engine, model, prompts)
        assert engine.stats().num_cached_prompt_tokens > 100


@pytest.mark.parametrize("num_labels", [1, 7])
@pytest.mark.parametrize("options", [{}, {"deterministic": True}], ids=["plain", "deterministic"])
def test_graph_runner_gives_the_same_logits(checkpoints, num_labels, options):
    directory, model = checkpoints("llama", num_labels=num_labels, num_hidden_layers=1)
    sizes = {"max_batch_size": 3, "max_tokens_per_step": 16, "num_pages": 64, "page_size": 16}
    engine = make_engine(directory, **{**sizes, **options, "attention_backend": "triton"})
    check_logits(engine, model, create_prompts([1, 30, 7, 22]))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_two_ranks_give_the_logits_of_one(checkpoints, backend):
    directory, model = checkpoints("llama", num_labels=3, num_hidden_layers=1)
    sizes = {"max_batch_size": 3, "max_tokens_per_step": 16, "num_pages": 96, "page_size": 8, "max_seq_len": 128}
    engine = parallel_engine(directory, attention_backend=backend, **sizes)
    check_logits(engine, model, create_prompts([1, 7, 22]))
    engine.close()


@pytest.mark.parametrize("layout", [packed(), awq(), transformers_fp8_by_tensor()], ids=["packed", "awq", "fp8"])
def test_quantized_layers_and_a_head_that_is_not(checkpoints, tmp_path, edit, layout):
    """compressed-tensors names the head in `ignore`, or it is taken for quantized, which is refused; others mean it."""
    directory, model = checkpoints("llama", num_labels=3)
    meant = quantize_directory(directory, tmp_path, layout)
    if "ignore" in layout.config:
        with pytest.raises(ConfigError, match="a quantized score is not supported"):
            check_checkpoint(tmp_path)
        edit(tmp_path / "config.json", quantization_config={**layout.config, "ignore": ["score"]})
    quantized = type(model)(model.config).eval()
    quantized.load_state_dict(meant)
    check_logits(make_engine(tmp_path), quantized, create_prompts())


@pytest.mark.parametrize(
    ("num_pads", "prompt"),
    [(3, (9, 8, 7)), (1, (9, PAD, 7)), (4, ()), (0, (PAD, 7))],
    ids=["some", "inner", "only", "none"],
)
def test_padding_behind_a_text_does_not_count(checkpoints, num_pads, prompt):
    """As in transformers, which takes the state of the last token that is no padding; of padding alone, the first."""
    directory, model = checkpoints("llama", num_labels=2, pad_token_id=PAD)
    whole = (*prompt, *[PAD] * num_pads)
    check_logits(make_engine(directory), model, [whole, (9, 8)])
    engine, plain = make_engine(directory), make_engine(checkpoints("llama", num_labels=2)[0])
    if num_pads and prompt:
        assert not np.allclose(*(each.classify([whole], progress=False) for each in (engine, plain)), atol=1e-3)


def test_a_head_of_the_model_before_is_left_out(checkpoints, tmp_path):
    """Some training saves the head for tokens beside the one for labels; names may have a prefix, too."""
    directory, model = checkpoints("qwen3", num_labels=2)
    tensors = {f"module.{name}": tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file({**tensors, "module.lm_head.weight": torch.ones(199, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    assert not check_checkpoint(tmp_path).warnings
    check_logits(make_engine(tmp_path), model, create_prompts())


@pytest.mark.parametrize(
    ("changes", "num_labels"),
    [
        ({"id2label": None}, 2),
        ({"id2label": None, "num_labels": 1}, 1),
        ({"id2label": {"0": "bad", "1": "good"}, "num_labels": 7}, 2),
    ],
)
def test_how_many_labels_there_are(checkpoints, tmp_path, edit, changes, num_labels):
    """As transformers counts them."""
    directory, model = checkpoints("llama", num_labels=num_labels)
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit(tmp_path / "config.json", **{"label2id": None, **changes})
    assert check_checkpoint(tmp_path).config.num_labels == num_labels
    check_logits(make_engine(tmp_path), model, create_prompts([7]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, ConfigError, "numbers from 0 on"),
        ({"id2label": ["a"]}, ConfigError, "object of names"),
        ({"id2label": None, "num_labels": 0}, ConfigError, "'num_labels' is 0"),
        ({"id2label": {"0": "a"}}, CheckpointError, r"score\.weight has shape \(2, 64\)"),
        ({"architectures": ["LlamaForCausalLM"]}, CheckpointError, r"score\.weight, for which"),
        ({"architectures": ["LlamaForTokenClassification"]}, CheckpointError, "not supported"),
        ({"classifier_from_token": ["no", "yes"]}, ConfigError, "Qwen3ForCausalLM"),
    ],
)
def test_what_does_not_fit_is_refused(checkpoints, tmp_path, edit, changes, error, message):
    directory, _ = checkpoints("llama", num_labels=2)
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(error, match=message):
        check_checkpoint(tmp_path)


def test_a_checkpoint_without_its_head_is_refused(checkpoints, tmp_path):
    directory, _ = checkpoints("llama", num_labels=2)
    tensors = load_file(directory / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"lacks score\.weight"):
        check_checkpoint(tmp_path)


def test_a_model_does_only_what_it_has_a_head_for(checkpoints):
    classifier = make_engine(checkpoints("llama", num_labels=2)[0])
    generator = make_engine(checkpoints("llama")[0])
    for request in ({"max_new_tokens": 3}, {"pooling": Pooling.LAST}, {"pooling": Pooling.MEAN}):
        with pytest.raises(InvalidRequestError, match="gives labels"):
            classifier.add_request(GenerationRequest(prompt_token_ids=(7, 8), **request))
    with pytest.raises(InvalidRequestError, match="no head for labels"):
        generator.classify([(7, 8)], progress=False)
    assert generator.embed([(7, 8)], progress=False).shape == (1, 64)


def test_requests_choose_adapters(checkpoints, tmp_path):
    """Each equals a model into which its adapter is merged."""
    directory, _ = checkpoints("llama", num_labels=3)
    model = load_decoder(directory, progress=False)
    write_random_adapter(model.config, tmp_path, rank=4, seed=1, std=0.08)
    adapter = AdapterRef(name="x", path=str(tmp_path), digest=adapter_digest(tmp_path))
    engine, prompt = make_engine(directory, max_adapters=1), create_prompts([40])[0]
    wanted = [
        GenerationRequest(prompt_token_ids=prompt, pooling=Pooling.LABELS, adapter=each) for each in (None, adapter)
    ]
    found = [np.frombuffer(each.vector, np.float32) for each in engine.generate(wanted, progress=False)]
    engine.close()
    load_lora(model, tmp_path)
    model.merge_lora()
    merged = ContinuousBatchingEngine(model, config=EngineConfig(**SIZES))
    plain = make_engine(directory)
    expected = [each.classify([prompt], progress=False)[0] for each in (plain, merged)]
    assert np.abs(expected[0] - expected[1]).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=CLOSE, rtol=0)
