"""Checkpoints in 8 and 4 bits: the logits are those of the weights that they mean, and the rest is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantized_layouts import (
    Layout,
    all_layouts,
    awq,
    fp8_by_channel,
    fp8_by_tensor,
    gptq,
    is_projection,
    modelopt,
    packed,
    quantize_directory,
    rewrite,
)
from safetensors.torch import load_file, save_file
from test_cuts import check_cut

from deployments.replica.model_memory import weight_bytes
from llm.attention.dense import DenseContext
from llm.checkpoint.adapter import load_lora
from llm.checkpoint.loading import check_checkpoint, load_decoder
from llm.checkpoint.model_config import load_model_config
from llm.config import EngineConfig, Quantization, WeightFormat, WeightLayout
from llm.errors import CheckpointError, ConfigError
from llm.models.cache_scales import fold_cache_scales
from llm.models.decoder import DecoderModel
from llm.models.quantized import QuantizedExperts, QuantizedLinear, quantized_modules
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

LAYOUTS = dict(all_layouts())


def fp8_by_channel_with(**changes) -> Layout:
    layout = fp8_by_channel()
    return Layout({**layout.config, **changes}, layout.write)


KINDS = ["llama", "llama_mqa_biases", "qwen2_tied", "qwen3", "phi3", "gemma3"]


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 199, (2, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def expected_logits(theirs, meant: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits with the weights that a quantized checkpoint means."""
    plain = type(theirs)(theirs.config).eval()
    plain.load_state_dict(meant, strict=False)
    plain.tie_weights()
    return plain(ids, use_cache=False).logits


def write(checkpoints, directory: Path, layout: Layout, kind: str = "llama", **options) -> dict[str, torch.Tensor]:
    return quantize_directory(checkpoints(kind)[0], directory, layout, **options)


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_logits_are_those_of_the_weights_that_are_meant(checkpoints, tmp_path, name):
    """Within 1e-4 in float32, for every layout."""
    ids = prompt(40)
    meant = write(checkpoints, tmp_path, LAYOUTS[name])
    ours = load_decoder(tmp_path, progress=False)
    assert len(list(quantized_modules(ours))) == 4 * 3
    expected = expected_logits(checkpoints("llama")[1], meant, ids)
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["awq 32", "gptq 32 act-order", "fp8 by tensor", "transformers' fp8 by block"])
@torch.inference_mode()
def test_every_family_takes_them(checkpoints, tmp_path, name, kind):
    """Parts of a product keep their own scales; biases, norms and tied embeddings stay as they are."""
    ids = prompt(20)
    meant = write(checkpoints, tmp_path, LAYOUTS[name], kind)
    expected = expected_logits(checkpoints(kind)[1], meant, ids)
    torch.testing.assert_close(load_decoder(tmp_path, progress=False)(ids), expected, atol=1e-4, rtol=0)


def is_of_expert(name: str) -> bool:
    return ".experts." in name


EXPERT_LAYOUTS = [
    "awq 32", "gptq 32 act-order", "gptq -1 symmetric", "packed asymmetric", "fp8 by tensor", "fp8 by channel",
    "transformers' fp8 by block", "fp8 by block, partial",
]  # fmt: skip
EXPERT_SHAPE = {"moe_intermediate_size": 64}


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
@torch.inference_mode()
def test_experts_are_those_that_are_meant(checkpoints, tmp_path, name):
    """Each in its own tensors, gates and what they gate apart, as the files of Qwen3-30B-A3B are."""
    source, theirs = checkpoints("qwen3_moe", **EXPERT_SHAPE)
    meant = quantize_directory(source, tmp_path, LAYOUTS[name], lambda name: is_of_expert(name) or is_projection(name))
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, plain / "model.safetensors")
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    assert all(isinstance(layer.experts.gate_up_proj, QuantizedExperts) for layer in ours.layers)
    expected = type(theirs).from_pretrained(plain).eval()(ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


LATENT_SHAPE = {"kv_lora_rank": 32, "q_lora_rank": 64, "v_head_dim": 16, "moe_intermediate_size": 32}


def is_of_latents(name: str) -> bool:
    return is_projection(name) or name.endswith("kv_a_proj_with_mqa.weight")


@pytest.mark.parametrize("name", ["awq 32", "gptq 32 act-order", "fp8 by tensor", "transformers' fp8 by block"])
@torch.inference_mode()
def test_latent_attention_takes_them(checkpoints, tmp_path, name):
    """As DeepSeek-V3's files are, the projection out of the space of latents too, which engines unpack."""
    source, theirs = checkpoints("deepseek_v3", **LATENT_SHAPE)
    meant = quantize_directory(source, tmp_path, LAYOUTS[name], is_of_latents)
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, plain / "model.safetensors")
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    assert all(isinstance(layer.heads.kv_proj, QuantizedLinear) for layer in ours.layers)
    expected = type(theirs).from_pretrained(plain).eval()(ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)
    engine = ContinuousBatchingEngine(ours, config=EngineConfig(max_seq_len=64))
    assert not any(isinstance(layer.heads.kv_proj, QuantizedLinear) for layer in engine.model.layers)
    request = GenerationRequest(prompt_token_ids=tuple(ids[0].tolist()), max_new_tokens=1, temperature=0)
    [result] = engine.generate([request], progress=False)
    assert result.token_ids == (int(expected[0, -1].argmax()),)


@pytest.mark.parametrize(
    ("name", "by_expert"),
    [
        ("awq 32", False),
        ("gptq 32 act-order", True),
        ("transformers' fp8 by tensor", False),
        ("transformers' fp8 by block", True),
    ],
)
def test_experts_are_cut_over_ranks(checkpoints, tmp_path, name, by_expert):
    """In the width of each, or whole ones: the logits are those of the model in one piece."""
    source = checkpoints("qwen3_moe", **EXPERT_SHAPE)[0]
    layout = LAYOUTS[name]
    layout = Layout({**layout.config, "modules_to_not_convert": ["self_attn"]}, layout.write)
    quantize_directory(source, tmp_path, layout, is_of_expert)
    check_cut(tmp_path, 2, by_expert=by_expert)


@torch.inference_mode()
def test_experts_alone_in_codes_under_other_names(checkpoints, tmp_path):
    """Mixtral's, with attention in 16 bits."""
    source, theirs = checkpoints("mixtral")
    layout = awq(modules_to_not_convert=["self_attn", "gate"])
    meant = quantize_directory(source, tmp_path, layout, is_of_expert)
    plain = tmp_path / "plain"
    shutil.copytree(source, plain)
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, plain / "model.safetensors")
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    assert len(list(quantized_modules(ours))) == 2 * 3
    expected = type(theirs).from_pretrained(plain).eval()(ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_engine_gives_the_tokens_of_the_weights_that_are_meant(checkpoints, tmp_path):
    """Greedy, several requests at once; `engine.quantization` need not be given."""
    meant = write(checkpoints, tmp_path / "4 bits", awq())
    shutil.copytree(checkpoints("llama")[0], tmp_path / "plain")
    save_file({name: tensor.contiguous() for name, tensor in meant.items()}, tmp_path / "plain" / "model.safetensors")
    requests = [
        GenerationRequest(prompt_token_ids=tuple(prompt(n)[0].tolist()), max_new_tokens=12, temperature=0)
        for n in (3, 30)
    ]
    texts = []
    for name in ("4 bits", "plain"):
        engine = ContinuousBatchingEngine.from_pretrained(
            tmp_path / name, device="cpu", with_tokenizer=False, progress=False, config=EngineConfig(max_seq_len=64)
        )
        texts.append([result.token_ids for result in engine.generate(requests, progress=False)])
    assert texts[0] == texts[1]
    assert all(len(tokens) == 12 for tokens in texts[0])


@pytest.mark.parametrize(("kind", "shape"), [("llama", {}), ("qwen3_moe", EXPERT_SHAPE)])
@torch.inference_mode()
def test_the_kernels_give_the_tokens_of_the_torch_operations(checkpoints, tmp_path, kind, shape):
    """In float32; prompts in chunks beside decodes."""
    source, is_quantized = checkpoints(kind, **shape)[0], lambda name: is_of_expert(name) or is_projection(name)
    quantize_directory(source, tmp_path, LAYOUTS["gptq 32 act-order"], is_quantized)
    requests = [
        GenerationRequest(prompt_token_ids=tuple(prompt(n)[0].tolist()), max_new_tokens=3, temperature=0)
        for n in (2, 11)
    ]
    tokens = []
    for backend in ("triton", "reference"):
        config = EngineConfig(attention_backend=backend, num_pages=16, max_batch_size=2, max_tokens_per_step=8)
        engine = ContinuousBatchingEngine(load_decoder(tmp_path, progress=False), config=config)
        tokens.append([result.token_ids for result in engine.generate(requests, progress=False)])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("pattern", "is_ignored"),
    [
        ("model.language_model.layers.3.linear_attn.in_proj_a", True),
        ("re:model[.]language_model[.]layers[.]3[.]", True),
        ("re:.*in_proj_a", True),
        ("model.language_model.layers.3.linear_attn.in_proj_b", False),
    ],
)
def test_names_of_a_text_half_are_the_models_own(pattern, is_ignored):
    """Where the checkpoint has more halves than one, its lists name modules as its files do."""
    formats = (WeightFormat(layout=WeightLayout.FP8),)
    found = Quantization(formats=formats, ignored=(pattern,)).format_of("model.layers.3.linear_attn.in_proj_a")
    assert (found is None) is is_ignored


@pytest.mark.parametrize("ignored", ["re:.*self_attn.*", "model.layers.1"])
@torch.inference_mode()
def test_ignored_projections_stay_as_they_are(checkpoints, tmp_path, ignored):
    layout = fp8_by_tensor(ignore=["lm_head", ignored])
    is_ignored = {"re:.*self_attn.*": "self_attn", "model.layers.1": "layers.1."}[ignored]
    meant = write(
        checkpoints, tmp_path, layout, is_quantized=lambda name: "_proj.weight" in name and is_ignored not in name
    )
    ours = load_decoder(tmp_path, progress=False)
    names = {name for name, _ in quantized_modules(ours)}
    assert names == {
        f"layers.{layer}.{module}"
        for layer in range(3)
        for module in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        if (layer != 1 if is_ignored == "layers.1." else "mlp" in module or module in ("gate_up_proj", "down_proj"))
    }
    ids = prompt(20)
    torch.testing.assert_close(ours(ids), expected_logits(checkpoints("llama")[1], meant, ids), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_groups_of_projections_may_have_formats_of_their_own(checkpoints, tmp_path):
    """4 bits for the feed-forward, 8 for attention, in one checkpoint of compressed-tensors."""
    by_channel, in_4_bits = fp8_by_channel(), packed(has_zeros=True)
    attention, mlp = (layout.config["config_groups"]["group_0"] for layout in (by_channel, in_4_bits))
    groups = {
        "attention": {**attention, "targets": ["re:.*self_attn.*"], "format": "float-quantized"},
        "mlp": {**mlp, "format": "pack-quantized"},
    }

    def write_of(name: str):
        layout = by_channel if "self_attn" in name else in_4_bits
        return layout.write if is_projection(name) else None

    source = checkpoints("llama")[0]
    meant = rewrite(source, tmp_path, {**by_channel.config, "config_groups": groups, "format": "mixed"}, write_of)
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    assert {module.weight_format.num_bits for _, module in quantized_modules(ours)} == {4, 8}
    torch.testing.assert_close(ours(ids), expected_logits(checkpoints("llama")[1], meant, ids), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_gptqmodel_says_by_pattern_what_differs(checkpoints, tmp_path):
    """`dynamic`: projections in 16 bits, and some with groups of another size; then what others note beside it."""
    usual, wider = gptq(), gptq(-1)
    dynamic = {r"-:.*self_attn\..*": {}, r"+:.*\.1\.mlp\..*": {"bits": 4, "group_size": -1}}
    notes = {"method": "gptq", "format": "gptq", "autoround_version": "0.5.1", "data_type": "int", "iters": 200}

    def write_of(name: str):
        if not is_projection(name) or "self_attn" in name:
            return None
        return (wider if ".1.mlp." in name else usual).write

    source = checkpoints("llama")[0]
    meant = rewrite(source, tmp_path, {**usual.config, "dynamic": dynamic, **notes}, write_of)
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    sizes = {name: module.weight_format.group_size for name, module in quantized_modules(ours)}
    assert sizes["layers.1.down_proj"] is None
    assert sizes["layers.0.down_proj"] == 32
    assert "layers.0.qkv_proj" not in sizes
    torch.testing.assert_close(ours(ids), expected_logits(checkpoints("llama")[1], meant, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("packing", "make"), [("auto_round:auto_gptq", gptq), ("auto_round:auto_awq", awq)])
@torch.inference_mode()
def test_autoround_says_by_name_or_pattern_what_differs(checkpoints, tmp_path, packing, make):
    """What Intel publishes: packed as by AutoGPTQ or AutoAWQ, and `extra_config` for what differs."""
    usual, finer = make(), make(16)
    extra = {
        "lm_head": {"bits": 16, "data_type": "float"}, "model.layers.0.self_attn": {"bits": 16, "data_type": "fp"},
        r".*layers\.1\.mlp.*": {"bits": 4, "group_size": 16, "sym": False, "data_type": "int"},
        "model.layers.2.mlp.down_proj": {"bits": 4, "sym": False},
    }  # fmt: skip
    config = {
        "quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": False,
        "data_type": "int", "autoround_version": "0.14.2", "iters": 0, "model_free": True, "extra_config": extra,
        "block_name_to_quantize": "model.layers", "act_bits": 16, "low_gpu_mem_usage": True, "nsamples": 512,
    }  # fmt: skip

    def write_of(name: str):
        if not is_projection(name) or ".0.self_attn" in name:
            return None
        return (finer if ".1.mlp." in name else usual).write

    meant = rewrite(checkpoints("llama")[0], tmp_path, config, write_of)
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    sizes = {name: module.weight_format.group_size for name, module in quantized_modules(ours)}
    assert (sizes["layers.1.down_proj"], sizes["layers.2.down_proj"], sizes["layers.1.qkv_proj"]) == (16, 32, 32)
    assert "layers.0.qkv_proj" not in sizes
    torch.testing.assert_close(ours(ids), expected_logits(checkpoints("llama")[1], meant, ids), atol=1e-4, rtol=0)


AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
AUTO_ROUND_REFUSALS = {
    "bits": ({"bits": 2}, "bits 2 is not supported; supported: 4"),
    "packing": ({"packing_format": "auto_round:llm_compressor"}, "packing_format 'auto_round:llm_compressor' is not"),
    "data type": ({"data_type": "mx_fp"}, "data_type 'mx_fp' is not supported"),
    "activations": ({"act_bits": 8}, "act_bits 8 is not supported"),
    "some of 8 bits": ({"extra_config": {"lm_head": {"bits": 8}}}, "extra_config.lm_head: bits 8 is not supported"),
    "no pattern": ({"extra_config": {".*(": {"bits": 16}}}, "extra_config: 're:.* is not a pattern"),
    "no settings": ({"extra_config": {"lm_head": 16}}, "lm_head 16 is not supported; it must be a JSON object"),
    "unknown": ({"rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
}


@pytest.mark.parametrize("name", AUTO_ROUND_REFUSALS)
def test_what_autoround_has_beyond_that_is_refused_by_its_key(checkpoints, tmp_path, edit, name):
    changes, reason = AUTO_ROUND_REFUSALS[name]
    write(checkpoints, tmp_path, gptq())
    edit(tmp_path / "config.json", quantization_config={**AUTO_ROUND, **changes})
    with pytest.raises(ConfigError, match=reason) as info:
        check_checkpoint(tmp_path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("file", "layout", "names"),
    [
        ("quantize_config.json", gptq(), {}),
        ("quant_config.json", awq(), {"bits": "w_bit", "group_size": "q_group_size"}),
    ],
)
@torch.inference_mode()
def test_older_files_have_the_settings_beside_the_configuration(checkpoints, tmp_path, edit, file, layout, names):
    """AutoGPTQ's and AutoAWQ's, of before transformers read them."""
    meant = write(checkpoints, tmp_path, layout)
    edit(tmp_path / "config.json", quantization_config=None)
    settings = {names.get(key, key): value for key, value in layout.config.items() if key != "quant_method"}
    (tmp_path / file).write_text(json.dumps(settings))
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    torch.testing.assert_close(ours(ids), expected_logits(checkpoints("llama")[1], meant, ids), atol=1e-4, rtol=0)


def test_biases_of_zeros_beside_gptq_count_for_nothing(checkpoints, tmp_path):
    """AutoGPTQ wrote one for each projection at first, of models without biases too. One that says something has no
    place."""
    write(checkpoints, tmp_path, gptq())
    path, expected = tmp_path / "model.safetensors", load_decoder(tmp_path, progress=False)
    tensors = load_file(path)
    bias = {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}
    save_file({**tensors, **bias}, path)
    assert torch.equal(load_decoder(tmp_path, progress=False)(prompt(9)), expected(prompt(9)))
    save_file({**tensors, **{name: zeros + 1 for name, zeros in bias.items()}}, path)
    with pytest.raises(CheckpointError, match=r"up_proj\.bias, for which config\.json has no place"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("algorithm", ["FP8", "FP8_PB_WO"])
@torch.inference_mode()
def test_modelopts_own_file_says_what_config_json_does_not(checkpoints, tmp_path, edit, algorithm):
    """With scales of keys and values beside their projections, and stars in names."""
    layout = modelopt(algorithm)
    meant = write(
        checkpoints, tmp_path, layout, is_quantized=lambda each: is_projection(each) and ".1.mlp." not in each
    )
    edit(tmp_path / "config.json", quantization_config=None)
    said = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head", "model.layers.1.mlp*"],
    }
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    scales = {
        f"model.layers.{i}.self_attn.{name}_proj.{name}_scale": torch.tensor(0.5) for i in (0, 1) for name in "kv"
    }
    weights = tmp_path / "model.safetensors"
    save_file({**load_file(weights), **scales}, weights)
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    torch.testing.assert_close(ours(ids), expected_logits(checkpoints("llama")[1], meant, ids), atol=1e-4, rtol=0)
    assert ours.cache_scales is not None
    assert (ours.cache_scales[:2] == 0.5).all()
    for changes, reason in (
        ({"quant_algo": "NVFP4"}, "quant_algo 'NVFP4'"),
        ({"kv_cache_quant_algo": "NVFP4"}, "kv_cache_quant_algo 'NVFP4'"),
        ({"has_rotations": True}, "has_rotations"),
    ):
        path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {**said, **changes}}))
        with pytest.raises(ConfigError, match=rf"hf_quant_config\.json\.quantization: {reason}"):
            check_checkpoint(tmp_path)


@torch.inference_mode()
def test_weights_in_4_bits_for_activations_in_8_load(checkpoints, tmp_path):
    """Activations keep 16 bits here, which is nearer to what was trained."""
    layout, activations = packed(), {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    layout.config["config_groups"]["group_0"]["input_activations"] = activations
    meant = write(checkpoints, tmp_path, layout)
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    torch.testing.assert_close(ours(ids), expected_logits(checkpoints("llama")[1], meant, ids), atol=1e-4, rtol=0)


def test_a_block_may_be_written_as_text(checkpoints, tmp_path):
    """As compressed-tensors did at first."""
    layout = LAYOUTS["fp8 by block"]
    write(checkpoints, tmp_path, layout)
    expected = load_model_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["block_structure"] = "32x32"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model_config(tmp_path) == expected


CONFIG_REFUSALS = {
    "bits": (gptq(), {"bits": 8}, r"quantization_config: bits 8 is not supported; supported: 4"),
    "other bits for some": (gptq(), {"dynamic": {"+:.*": {"bits": 8}}}, r"dynamic.\+:.\*: bits 8 is not supported"),
    "no pattern": (gptq(), {"dynamic": {"-:(": {}}}, r"dynamic: 're:\(' is not a pattern"),
    "method": (gptq(), {"method": "qqq"}, "method 'qqq' is not supported; supported: 'gptq'"),
    "data type": (awq(), {"data_type": "mx_fp"}, "data_type 'mx_fp' is not supported"),
    "lm_head": (gptq(), {"lm_head": True}, "lm_head True is not supported"),
    "version": (awq(), {"version": "gemv"}, "version 'gemv' is not supported; only the gemm layout is"),
    "zero_point": (awq(), {"zero_point": False}, "zero_point False is not supported"),
    "group_size": (awq(), {"group_size": 48}, "inputs, which are not whole groups of group_size 48"),
    "quant_method": (awq(), {"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
    "unknown": (awq(), {"rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
    "format": (fp8_by_tensor(), {"format": "marlin-24"}, "format 'marlin-24' is not supported"),
    "sparsity": (fp8_by_tensor(), {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask'"),
    "transforms": (fp8_by_tensor(), {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config .* is not"),
    "ignored parts": (fp8_by_tensor(), {"ignore": ["lm_head", "re:.*k_proj"]}, "q_proj.* are one product here"),
    "head": (fp8_by_tensor(), {"ignore": []}, "a quantized lm_head is not supported"),
    "pattern": (fp8_by_tensor(), {"ignore": ["re:("]}, "ignore: 're:\\(' is not a pattern"),
    "block": (LAYOUTS["transformers' fp8 by block"], {"weight_block_size": [128]}, r"weight_block_size \[128\]"),
    "cache": (fp8_by_tensor(), {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "kv_cache_scheme: num_bits 4"),
}


@pytest.mark.parametrize("name", CONFIG_REFUSALS)
def test_unsupported_settings_are_refused_by_their_key(checkpoints, tmp_path, edit, name):
    layout, changes, reason = CONFIG_REFUSALS[name]
    write(checkpoints, tmp_path, layout)
    edit(tmp_path / "config.json", quantization_config={**layout.config, **changes})
    with pytest.raises(ConfigError, match=reason) as info:
        check_checkpoint(tmp_path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("kind", "what"), [("gpt_oss", r"gate_up_proj in fp8 is not supported"), ("qwen3_5", "what a state keeps")]
)
def test_projections_that_no_format_is_for_are_refused(checkpoints, tmp_path, kind, what):
    write(checkpoints, tmp_path, fp8_by_tensor(), kind)
    with pytest.raises(ConfigError, match=f"quantization_config: .*{what}"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["transformers' fp8 by block", "packed asymmetric", "awq 32"])
@torch.inference_mode()
def test_rows_that_change_places_take_their_scales_along(checkpoints, tmp_path, name, edit):
    """Qwen3-Next's first projection, whose rows come key head by key head in a file."""
    layout = LAYOUTS[name]
    meant = write(checkpoints, tmp_path, layout, "qwen3_next", is_quantized=lambda each: "in_proj_qkvz" in each)
    others = ["lm_head", "re:.*mlp.*", "re:.*self_attn.*", "re:.*in_proj_ba.*", "re:.*out_proj.*", "re:.*conv1d.*"]
    key = "ignore" if layout.config["quant_method"] == "compressed-tensors" else "modules_to_not_convert"
    edit(tmp_path / "config.json", quantization_config={**layout.config, key: others})
    ours, ids = load_decoder(tmp_path, progress=False), prompt(20)
    assert {each.rpartition(".")[2] for each, _ in quantized_modules(ours)} == {"mixed_proj"}
    plain = shutil.copytree(checkpoints("qwen3_next")[0], tmp_path / "plain")
    save_file({each: tensor.contiguous() for each, tensor in meant.items()}, plain / "model.safetensors")
    torch.testing.assert_close(ours(ids), load_decoder(plain, progress=False)(ids), atol=1e-4, rtol=0)
    check_cut(tmp_path, 2)


def test_files_that_do_not_hold_what_the_configuration_says(checkpoints, tmp_path, edit):
    write(checkpoints, tmp_path, awq())
    edit(tmp_path / "config.json", quantization_config=gptq().config)
    with pytest.raises(CheckpointError, match=r"qweight has shape .*config\.json asks for"):
        check_checkpoint(tmp_path)
    edit(tmp_path / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match=r"qweight, which is quantized, but config\.json does not say so"):
        check_checkpoint(tmp_path)
    write(checkpoints, tmp_path, fp8_by_tensor())
    edit(tmp_path / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("has_order", [False, True])
def test_groups_that_do_not_fit_are_refused(checkpoints, tmp_path, has_order):
    """Inputs in another order than desc_act says; parts of a product in different orders."""
    write(checkpoints, tmp_path, gptq(has_order=has_order))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.g_idx"
    save_file({**tensors, name: tensors[name].flip(0)}, tmp_path / "model.safetensors")
    reason = "in another order than what it is multiplied together with" if has_order else "desc_act"
    with pytest.raises(CheckpointError, match=reason):
        load_decoder(tmp_path, progress=False)


def test_an_adapter_on_quantized_weights_is_refused(checkpoints, tmp_path):
    write(checkpoints, tmp_path / "model", awq())
    model = load_decoder(tmp_path / "model", progress=False)
    factors = {"A": torch.ones(2, 64), "B": torch.ones(64, 2)}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format(part): factor for part, factor in factors.items()}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"q_proj is quantized \(quantization_config\)"):
        load_lora(model, tmp_path)


def test_rounding_what_is_in_4_bits_already_is_refused(checkpoints, tmp_path):
    write(checkpoints, tmp_path, awq())
    model = load_decoder(tmp_path, progress=False)
    with pytest.raises(ConfigError, match="quantization: fp8 is not what the checkpoint holds"):
        ContinuousBatchingEngine(model, config=EngineConfig(quantization="fp8", num_pages=8))


def test_a_model_with_random_codes_can_be_made(checkpoints, tmp_path):
    """For the speed of a shape: codes, not the weights of 16 bits, are made on the device."""
    write(checkpoints, tmp_path, awq())
    torch.manual_seed(0)
    model = DecoderModel.from_config(load_model_config(tmp_path), dtype=torch.bfloat16)
    (_, module), *_ = quantized_modules(model)
    assert module.dequantized().std() == pytest.approx(0.02, rel=0.3)
    assert module.scales.dtype == torch.float16
    assert model(prompt(5)).isfinite().all()


def test_outputs_are_multiplied_after_an_engine_has_joined_scales_and_zeros(checkpoints, tmp_path):
    """As another engine of the same model does, whose cache has scales."""
    write(checkpoints, tmp_path, awq())
    (_, module), *_ = quantized_modules(load_decoder(tmp_path, progress=False))
    before = module.dequantized()
    module.join()
    assert module.zeros is None
    module.multiply_outputs(torch.full((len(before),), 4.0))
    module.join()
    assert torch.equal(module.dequantized(), 4 * before)


def test_check_knows_the_memory(checkpoints, tmp_path):
    """A quarter of the projections' 16 bits, and their scales and zeros."""
    source = checkpoints("llama")[0]
    plain = weight_bytes(load_model_config(source), 2)
    write(checkpoints, tmp_path, awq())
    projections = sum(
        tensor.numel() for name, tensor in load_file(source / "model.safetensors").items() if is_projection(name)
    )
    assert (
        weight_bytes(load_model_config(tmp_path), 2)
        == plain - projections * 2 + projections // 2 + projections // 32 * 5
    )


class Stored(DenseContext):
    """Attention that shows which keys and values it is given."""

    def __init__(self) -> None:
        super().__init__(None)
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(self, layer, spec, query, key, value, *more):
        self.pairs.append((key.clone(), value.clone()))
        return super().attend(layer, spec, query, key, value, *more)


CACHE_NAMES = {"today's": "self_attn.{}_scale", "older": "self_attn.{}_proj.output_scale"}


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", ["llama", "llama_mqa_biases", "qwen3"])
@torch.inference_mode()
def test_scales_of_the_cache_divide_keys_and_values_and_change_nothing_else(checkpoints, tmp_path, kind, name):
    """Rounded up to powers of two; a layer without has none, and keys behind a norm need none."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    write(checkpoints, tmp_path, fp8_by_channel_with(kv_cache_scheme=scheme), kind)
    path, prefix = tmp_path / "model.safetensors", f"model.layers.1.{CACHE_NAMES[name]}"
    scales = {prefix.format("k"): torch.tensor([0.03]), prefix.format("v"): torch.tensor(3.0)}
    save_file({**load_file(path), **scales}, path)
    model, ids = load_decoder(tmp_path, progress=False), prompt(9)
    before, after = Stored(), Stored()
    plain = model.hidden_states(ids, torch.arange(9), before)
    fold_cache_scales(model)
    fold_cache_scales(model)
    torch.testing.assert_close(model.hidden_states(ids, torch.arange(9), after), plain, atol=1e-4, rtol=0)
    for layer, (old, new) in enumerate(zip(before.pairs, after.pairs, strict=True)):
        key, value = (2**5 if kind != "qwen3" else 1, 1 / 4) if layer == 1 else (1, 1)
        torch.testing.assert_close(new[0], old[0] * key, rtol=1e-4, atol=1e-4 * key)
        torch.testing.assert_close(new[1], old[1] * value, rtol=1e-4, atol=1e-4)
