"""Models in GGUF files: the same as the checkpoints that they were made of, wherever a checkpoint may be named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf_files import MERGES, VOCAB_SIZE, tokens, write_gguf, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.cli.serve import _find_models
from deployments.config import AppConfig, resolve_paths
from deployments.fingerprint import fingerprint_of
from deployments.serve.config_file import BUILDER, check_config_file
from llm.checkpoint import gguf_convert
from llm.checkpoint.generation_defaults import load_generation_defaults
from llm.checkpoint.gguf_convert import convert
from llm.checkpoint.hub import find_local_checkpoint, resolve_model_path
from llm.checkpoint.loading import check_checkpoint, load_decoder
from llm.checkpoint.model_config import load_model_config
from llm.checkpoint.vector_defaults import load_vector_defaults
from llm.errors import CheckpointError, LLMError
from llm.schemas.requests import Pooling
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest
from llm.tokenization.hf_tokenizer import HFTokenizer


def gemma(name: str, **more: Any) -> dict[str, Any]:
    """What files of Gemma hold beside what all files do."""
    keys = {"attention__key_length": 16, "attention__value_length": 16, "attention__sliding_window": 17, **more}
    return {f"{name}__{key}": value for key, value in keys.items()}


KINDS = [
    ("llama", "llama", {}),
    ("llama", "llama_mha", {}),
    ("llama", "llama_mqa_biases", {}),
    ("llama", "llama_linear", {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}),
    ("llama", "llama_linear", {"llama__rope__scale_linear": 4.0}),
    (
        "llama",
        "llama",
        {
            "llama__attention__head_count": [8] * 3,
            "llama__attention__head_count_kv": [2] * 3,
            "llama__feed_forward_length": [96] * 3,
        },
    ),
    (
        "llama",
        "llama_yarn",
        {
            "llama__rope__scaling__type": "yarn",
            "llama__rope__scaling__factor": 4.0,
            "llama__rope__scaling__original_context_length": 32,
        },
    ),
    ("qwen2", "qwen2", {}),
    ("qwen2", "qwen2_tied", {}),
    ("qwen3", "qwen3", {"qwen3__attention__key_length": 24, "qwen3__attention__value_length": 24}),
    ("gemma2", "gemma2", gemma("gemma2", attn_logit_softcapping=1.5, final_logit_softcapping=12.0)),
    (
        "gemma3",
        "gemma3",
        gemma(
            "gemma3",
            rope__freq_base_swa=100.0,
            rope__scaling__type="linear",
            rope__scaling__factor=8.0,
            attention__sliding_window_pattern=3,
        ),
    ),
    (
        "gemma3",
        "gemma3",
        gemma(
            "gemma3",
            rope__freq_base_swa=100.0,
            rope__scaling__factor=8.0,
            attention__sliding_window_pattern=[True, True, False, True],
        ),
    ),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RAYLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def qwen3(checkpoints, tmp_path) -> Path:
    model = checkpoints("qwen3", vocab_size=VOCAB_SIZE)[1]
    return write_model(tmp_path / "small.gguf", "qwen3", model, qwen3__attention__key_length=24)


def refusal(path: Path) -> str:
    """The message with which a file is refused: one line that names it, or what was made of it."""
    with pytest.raises(LLMError) as info:
        check_checkpoint(resolve_model_path(str(path)))
    assert "\n" not in str(info.value)
    assert str(path) in str(info.value) or f"/gguf/{path.stem}-" in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(("architecture", "kind", "changes"), KINDS, ids=[kind for _, kind, _ in KINDS])
@torch.inference_mode()
def test_logits_are_those_of_the_model_in_the_file(checkpoints, tmp_path, architecture, kind, changes):
    # Files do not say what Gemma's scores are scaled by, which is the width of its heads in all but one size.
    own = {"query_pre_attn_scalar": 16, "tie_word_embeddings": True} if architecture.startswith("gemma") else {}
    theirs = checkpoints(kind, vocab_size=VOCAB_SIZE, **own)[1]
    path = write_model(tmp_path / "x.gguf", architecture, theirs, **changes)
    ids = torch.arange(150).reshape(2, 75)
    expected = theirs(ids, use_cache=False).logits
    ours = load_decoder(resolve_model_path(str(path)), progress=False)
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_llama_3_s_frequencies_are_found_again(checkpoints, tmp_path):
    """The file holds what each frequency is divided by; the context that they were made for is 8,192 tokens."""
    rope = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    theirs = checkpoints("llama", vocab_size=VOCAB_SIZE, head_dim=64, rope_parameters=rope)[1]
    plain = 1 / rope["rope_theta"] ** (np.arange(0, 64, 2) / 64)
    factors = plain / theirs.model.rotary_emb.inv_freq.numpy()
    assert (factors[0], factors[-1]) == pytest.approx((1, 32))
    keys = {"llama__attention__key_length": 64, "llama__attention__value_length": 64}
    path = write_model(tmp_path / "x.gguf", "llama", theirs, more_tensors={"rope_freqs.weight": factors}, **keys)
    directory = resolve_model_path(str(path))
    scaling = load_model_config(directory).rope_scaling
    assert scaling is not None
    assert rope.items() >= scaling.model_dump(include=set(rope), mode="json").items()
    ids = torch.arange(200)[None]
    torch.testing.assert_close(load_decoder(directory, progress=False)(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    others = {"rope_freqs.weight": factors * np.linspace(1, 1.1, len(factors))}
    path = write_model(tmp_path / "other.gguf", "llama", theirs, more_tensors=others, **keys)
    assert "rope_freqs.weight is not Llama 3's" in refusal(path)


def test_an_engine_is_made_of_a_file(qwen3):
    """Tokenizer, template and end-of-sequence ids are the file's own."""
    engine = ContinuousBatchingEngine.from_pretrained(qwen3, progress=False)
    texts = tokens()
    assert engine.tokenizer is not None
    assert engine.tokenizer.eos_token_ids == {texts.index("<|im_end|>"), texts.index("<|endoftext|>")}
    chat = engine.tokenizer.apply_chat_template([{"role": "user", "content": "hello w"}])
    assert [texts[i] for i in chat] == ["<|im_start|>", "hello", "Ġw", "<|im_end|>"]
    (result,) = engine.generate([GenerationRequest(prompt="hello", max_new_tokens=3)], progress=False)
    assert result.token_ids


def test_a_configuration_names_a_file(qwen3, tmp_path, monkeypatch):
    """By a relative path, too; every node reads the file itself, under the name of the file."""
    monkeypatch.chdir(tmp_path)
    content = {
        "http_options": {"host": "127.0.0.1"},
        "applications": [{"import_path": BUILDER, "args": {"model": "small.gguf"}}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    config = check_config_file(tmp_path / "config.yaml").apps["default"]
    assert config.model_name == "small"
    assert resolve_paths(config).model == str(qwen3)
    _find_models(content, {"default": config})
    assert content["applications"][0]["args"] == {"model": str(qwen3), "served_model_name": "small"}


def test_the_same_file_elsewhere_is_the_same_version(qwen3, tmp_path):
    copy = tmp_path / "another name.gguf"
    shutil.copy(qwen3, copy)
    first, second = (fingerprint_of(AppConfig(model=str(path))) for path in (qwen3, copy))
    assert first == second
    with copy.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"other weights")
    assert fingerprint_of(AppConfig(model=str(copy))) != first


def test_a_directory_with_nothing_but_a_file_is_that_file(qwen3, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copy(qwen3, directory / "one.gguf")
    found = resolve_model_path(str(directory))
    assert json.loads((found / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    shutil.copy(qwen3, directory / "mmproj-one.gguf")  # for images
    assert resolve_model_path(str(directory)) == found
    shutil.copy(qwen3, directory / "two.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF files \(one.gguf, two.gguf\); name one of them"):
        resolve_model_path(str(directory))


def test_what_is_made_of_a_file_is_made_once(qwen3, cache):
    """And anew when the file changes."""
    first = resolve_model_path(str(qwen3))
    made_at = (first / "config.json").stat().st_mtime_ns
    assert resolve_model_path(str(qwen3)) == first
    assert (first / "config.json").stat().st_mtime_ns == made_at
    os.utime(qwen3, ns=(1, 1))
    assert resolve_model_path(str(qwen3)) != first
    assert not list((cache / "gguf").glob(".*"))


def test_a_cache_that_cannot_be_written_is_named(qwen3, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYLINE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="set RAYLINE_CACHE to a directory that can be written"):
        resolve_model_path(str(qwen3))


def test_what_is_no_checkpoint_is_none(tmp_path):
    assert find_local_checkpoint(str(tmp_path / "missing.gguf")) is None
    (tmp_path / "notes.txt").write_text("no model")
    assert find_local_checkpoint(str(tmp_path / "notes.txt")) is None
    with pytest.raises(CheckpointError, match="is a file, but not a GGUF"):
        resolve_model_path(str(tmp_path / "notes.txt"))
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"pointer\.gguf is a pointer of Git LFS"):
        resolve_model_path(str(tmp_path / "pointer.gguf"))


def test_a_directory_of_parts_is_told_to_join_them(qwen3, tmp_path):
    directory = tmp_path / "parts"
    directory.mkdir()
    for part in (1, 2):
        shutil.copy(qwen3, directory / f"m-0000{part}-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"00001-of-00002.gguf is one of 2 parts of a model; join them"):
        resolve_model_path(str(directory))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qwen3__logit_scale": 0.5}, r"qwen3.logit_scale (0.5) may change what the model computes"),
        ({"qwen3__never_heard_of": 1}, r"qwen3.never_heard_of (1) may change"),
        ({"qwen3__block_count": None}, "lacks qwen3.block_count"),
        ({"qwen3__block_count": "three"}, "config.json: 'num_hidden_layers' is 'three'"),
        ({"qwen3__embedding_length": "wide"}, "holds a value that cannot be used"),
        ({"qwen3__rope__dimension_count": 16}, "rope.dimension_count 16 is not supported"),
        ({"qwen3__rope__scaling__type": "longrope", "qwen3__rope__scaling__factor": 2.0}, "'longrope' is not"),
        ({"qwen3__attention__head_count_kv": [2, 1, 2]}, "heads that differ by layer are not supported"),
        ({"qwen3__block_count": 2}, "holds model.layers.2."),
        ({"qwen3__block_count": 4}, "lacks model.layers.3."),
        ({"tokenizer__ggml__pre": "klingon"}, "tokenizer.ggml.pre 'klingon' is not supported; supported: deepseek"),
        ({"tokenizer__ggml__model": "bert"}, "tokenizer 'bert' is not supported"),
        ({"tokenizer__ggml__tokens": None}, "has no vocabulary"),
        ({"tokenizer__ggml__merges": None}, "lacks tokenizer.ggml.merges"),
        ({"tokenizer__ggml__merges": [*MERGES, "no way"]}, "holds a value that cannot be used"),
    ],
)
def test_what_is_not_understood_is_refused(checkpoints, tmp_path, changes, message):
    model = checkpoints("qwen3", vocab_size=VOCAB_SIZE)[1]
    changes = {"qwen3__attention__key_length": 24, **changes}
    assert message in refusal(write_model(tmp_path / "x.gguf", "qwen3", model, **changes))


def test_other_architectures_are_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", "mamba", {}, {"token_embd.weight": np.zeros((4, 32), np.float32)})
    assert "architecture 'mamba' is not supported in GGUF files; supported: llama, qwen2" in refusal(path)


def test_sampling_that_a_file_recommends_counts(checkpoints, tmp_path):
    model = checkpoints("qwen3", vocab_size=VOCAB_SIZE)[1]
    recommended = {
        "general__sampling__temp": 0.6,
        "general__sampling__top_k": 20,
        "general__sampling__top_p": 0.95,
        "general__sampling__min_p": 0.05,
        "general__sampling__penalty_repeat": 1.1,
    }
    path = write_model(tmp_path / "x.gguf", "qwen3", model, **recommended, qwen3__attention__key_length=24)
    defaults = load_generation_defaults(resolve_model_path(str(path)))
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (0.6, 20, 0.95, 0.05)
    assert defaults.repetition_penalty == 1.1
    assert defaults.bos_token_id == tokens().index("<|endoftext|>")


@pytest.mark.parametrize(("number", "pooling"), [(0, None), (1, Pooling.MEAN), (3, Pooling.LAST)])
def test_how_a_file_makes_vectors_counts(checkpoints, tmp_path, number, pooling):
    """llama.cpp's number for it, as in the files of Qwen3-Embedding."""
    model = checkpoints("qwen3", vocab_size=VOCAB_SIZE)[1]
    path = write_model(tmp_path / "x.gguf", "qwen3", model, qwen3__pooling_type=number, qwen3__attention__key_length=24)
    directory = resolve_model_path(str(path))
    check_checkpoint(directory)
    assert load_vector_defaults(directory).pooling is pooling


def test_templates_by_name_are_kept(checkpoints, tmp_path):
    model = checkpoints("qwen3", vocab_size=VOCAB_SIZE)[1]
    named = {"tokenizer__chat_templates": ["tool_use"], "tokenizer__chat_template__tool_use": "hello"}
    path = write_model(tmp_path / "x.gguf", "qwen3", model, **named, qwen3__attention__key_length=24)
    tokenizer = HFTokenizer.from_pretrained(resolve_model_path(str(path)))
    chat = [{"role": "user", "content": "w"}]
    assert tokenizer.decode(tokenizer.apply_chat_template(chat, tools=[{"name": "f"}])) == "hello"
    assert tokenizer.decode(tokenizer.apply_chat_template(chat)) == "w"


@pytest.mark.parametrize("max_shard_bytes", [4 << 30, 20_000], ids=["one file", "shards"])
@torch.inference_mode()
def test_a_converted_file_is_what_transformers_loads(checkpoints, tmp_path, monkeypatch, max_shard_bytes):
    """The weights that went into the file, bit by bit."""
    monkeypatch.setattr(gguf_convert, "_MAX_SHARD_BYTES", max_shard_bytes)
    model = checkpoints("llama_mqa_biases", vocab_size=VOCAB_SIZE)[1]
    path = write_model(tmp_path / "x.gguf", "llama", model)
    convert(path, tmp_path / "converted", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert loaded.dtype == torch.float32
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.arange(50)[None]
    ours = load_decoder(tmp_path / "converted", progress=False)
    torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-4, rtol=0)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert theirs("hello 123").input_ids == HFTokenizer.from_pretrained(tmp_path / "converted").encode("hello 123")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(path, tmp_path / "converted")
