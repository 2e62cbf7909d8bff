"""What the `quantization_config` of a config.json says of the weights' formats.

Read are compressed-tensors (github.com/vllm-project/compressed-tensors: float-quantized, pack-quantized), `fp8` as
transformers' `FineGrainedFP8Config` describes it, `fbgemm_fp8` as its `FbgemmFp8Config` does, `modelopt` (NVIDIA's
Model Optimizer, FP8), `awq` (AutoAWQ's gemm layout), `gptq` (AutoGPTQ, GPTQModel; both checkpoint formats),
`auto-round` (AutoRound's, packed as by AutoGPTQ or AutoAWQ) and `mxfp4` as gpt-oss's checkpoints have it. Whatever
changes a weight's meaning and is not read is refused by its key.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import translate
from pathlib import Path
from typing import Any

from llm.checkpoint.json_files import read_json_if_there
from llm.config import Quantization, WeightFormat, WeightLayout
from llm.core.mxfp4 import BLOCK_SIZE
from llm.errors import ConfigError
from llm.models.config_keys import key_names, shown

_MLX = "the format of MLX, which is not supported; use the checkpoint that it was made from"
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"
_SIZES = re.compile(r"\d{1,6}x\d{1,6}")
_HEADS = ("lm_head", "score")
"""Modules that tools leave as they are without saying so."""


_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Where AutoGPTQ, AutoAWQ and ModelOpt say it in files of their own, with the method that each means."""
_RENAMED = {"w_bit": "bits", "q_group_size": "group_size"}
"""AutoAWQ's own names."""


def read_quantization(config: Mapping[str, Any], directory: Path) -> Quantization | None:
    """The formats of a checkpoint's weights; None where they are plain numbers.

    Args:
        config: content of its config.json.
        directory: where a file of the tool may say what config.json does not.

    Raises:
        ConfigError: a setting is not supported: its key, its value and what is.
    """
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if found:
            if not isinstance(found, Mapping):
                raise ConfigError(f"{key} is {shown(found)}, which is not a JSON object")
            return _read(_Keys(found, key))
    if config.get("quantization"):
        raise ConfigError(f"quantization ({shown(config['quantization'])}) is {_MLX}")
    for name, method in _FILES.items():
        content = read_json_if_there(directory / name)
        if content:
            return _read(_Keys({"quant_method": method, **content}, name))
    return None


class _Keys:
    """The settings of one checkpoint, each checked as it is read."""

    def __init__(self, found: Mapping[str, Any], path: str) -> None:
        self.found = found
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        value = self.found.get(key)
        return default if value is None else value

    def refuse(self, key: str, supported: str, default: Any = None) -> ConfigError:
        return ConfigError(f"{self.path}: {key} {shown(self.get(key, default))} is not supported; {supported}")

    def require(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value of a key, which must be one of those allowed."""
        value = self.get(key, default)
        if value not in allowed:
            raise self.refuse(key, f"supported: {', '.join(map(repr, allowed))}", default)
        return value

    def refuse_others(self, known: frozenset[str]) -> None:
        """Refuse a key that is not known and says something."""
        for key, value in self.found.items():
            if key not in known and value not in (None, False, [], {}):
                raise self.refuse(key, "remove it if the weights mean the same without it")

    def inside(self, key: str) -> "_Keys":
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.refuse(key, "it must be a JSON object")
        return _Keys(value, f"{self.path}.{key}")

    def names(self, key: str) -> tuple[str, ...]:
        """A list of modules' names."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refuse(key, "it must be a list of names")
        for name in value:
            if name.startswith("re:"):
                try:
                    re.compile(name[3:])
                except re.error as error:
                    raise ConfigError(f"{self.path}: {key}: {name!r} is not a pattern ({error})") from error
        return tuple(value)

    def group_size(self) -> int | None:
        """Inputs that share a scale; None for all, which files call -1."""
        value = self.get("group_size", -1)
        if not isinstance(value, int) or (value != -1 and value < 1):
            raise self.refuse("group_size", "it must be a number of inputs, or -1 for all")
        return None if value == -1 else value


def _read(keys: _Keys) -> Quantization:
    method = keys.get("quant_method", "compressed-tensors" if keys.get("config_groups") else None)
    if method is None and keys.found.keys() >= {"bits", "group_size"}:
        raise ConfigError(f"{keys.path} ({shown(dict(keys.found))}) is {_MLX}")
    if method not in _METHODS:
        raise ConfigError(
            f"{keys.path}: quant_method {shown(method)} is not supported; supported: {', '.join(_METHODS)}; "
            "otherwise use the checkpoint in bfloat16 or float16"
        )
    return _METHODS[method](keys)


_COMPRESSED = key_names("""
    quant_method config_groups format ignore kv_cache_scheme quantization_status version global_compression_ratio
    sparsity_config
""")
_GROUP = key_names("weights input_activations output_activations targets format")


def _compressed_tensors(keys: _Keys) -> Quantization:
    keys.require("quantization_status", "compressed", "frozen", default="compressed")
    keys.refuse_others(_COMPRESSED)
    sparsity = keys.inside("sparsity_config")
    sparsity.require("format", "dense", default="dense")
    groups = keys.inside("config_groups")
    formats = tuple(_format_of_group(groups.inside(name), keys.get("format")) for name in groups.found)
    return Quantization(formats=formats, ignored=keys.names("ignore"), has_cache_scales=_has_cache_scales(keys))


def _has_cache_scales(keys: _Keys) -> bool:
    cache = keys.inside("kv_cache_scheme")
    if cache.found:
        cache.require("num_bits", 8)
        cache.require("type", "float")
        cache.require("strategy", "tensor", default="tensor")
        cache.require("symmetric", True, default=True)
    return bool(cache.found)


def _format_of_group(group: _Keys, default_format: str | None) -> WeightFormat:
    group.refuse_others(_GROUP)
    layout = group.require("format", "float-quantized", "naive-quantized", "pack-quantized", default=default_format)
    weights = group.inside("weights")
    strategy = weights.get("strategy", "tensor")
    targets = group.names("targets") or ("Linear",)
    if group.get("output_activations"):
        raise group.refuse("output_activations", "leave it out")
    weights.require("dynamic", False, default=False)
    if layout == "pack-quantized":
        weights.require("num_bits", 4)
        weights.require("type", "int", default="int")
        group.inside("input_activations").require("num_bits", 8, 16, default=16)  # they stay in 16 bits
        weights.require("strategy", "group", "channel")
        return WeightFormat(
            layout=WeightLayout.PACKED,
            targets=targets,
            group_size=weights.group_size() if strategy == "group" else None,
            has_zeros=not weights.get("symmetric", True),
            has_order=weights.require("actorder", None, False, "weight", "static", "group", "dynamic")
            in ("group", "dynamic"),
        )
    weights.require("num_bits", 8)
    weights.require("type", "float")
    weights.require("symmetric", True, default=True)
    weights.require("strategy", "tensor", "channel", "block", default="tensor")
    activations = group.inside("input_activations")
    if activations.found:
        activations.require("num_bits", 8)
        activations.require("type", "float")
    if strategy != "block":
        return WeightFormat(layout=WeightLayout.FP8, targets=targets)
    rows, columns = _block(weights, "block_structure")
    return WeightFormat(layout=WeightLayout.FP8, targets=targets, block_rows=rows, group_size=columns)


_FP8 = key_names("""
    quant_method activation_scheme weight_block_size modules_to_not_convert ignored_layers fmt scale_fmt dequantize
    is_checkpoint_fp8_serialized
""")


def _fp8(keys: _Keys) -> Quantization:
    keys.refuse_others(_FP8)
    keys.require("activation_scheme", "dynamic", "static", default="dynamic")
    keys.require("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    keys.require("is_checkpoint_fp8_serialized", True, default=True)
    ignored = (*_not_converted(keys), *keys.names("ignored_layers"))
    rows, columns = _block(keys, "weight_block_size") if keys.get("weight_block_size") else (None, None)
    return Quantization(
        formats=(WeightFormat(layout=WeightLayout.FP8, block_rows=rows, group_size=columns),), ignored=ignored
    )


def _fbgemm(keys: _Keys) -> Quantization:
    """A scale for each output. The bound of activations' scales is not needed: they are rounded by what they hold."""
    keys.refuse_others(key_names("quant_method activation_scale_ub modules_to_not_convert"))
    return Quantization(formats=(WeightFormat(layout=WeightLayout.FP8),), ignored=_not_converted(keys))


_MODELOPT_BLOCK = 128
"""Outputs, and inputs, that share a scale."""
_MODELOPT = key_names("""
    quant_method quant_algo kv_cache_quant_algo kv_cache_scheme exclude_modules ignore config_groups producer group_size
""")


def _modelopt(keys: _Keys) -> Quantization:
    """`hf_quant_config.json`, whose settings are in a part of it, or what newer versions write to config.json."""
    if keys.get("quantization"):
        keys.refuse_others(key_names("quant_method producer quantization"))
        keys = keys.inside("quantization")
    keys.refuse_others(_MODELOPT)
    algorithm = keys.require("quant_algo", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "fp8_pb_wo")
    cache = keys.require("kv_cache_quant_algo", None, "FP8")
    keys.require("group_size", None, _MODELOPT_BLOCK)
    block = _MODELOPT_BLOCK if algorithm.upper() == "FP8_PB_WO" else None
    fp8 = WeightFormat(layout=WeightLayout.FP8, block_rows=block, group_size=block)
    excluded = (*keys.names("exclude_modules"), *keys.names("ignore"))
    ignored = (f"re:{translate(name)}" if "*" in name else name for name in excluded)
    has_cache_scales = cache is not None or _has_cache_scales(keys)
    return Quantization(formats=(fp8,), ignored=(*ignored, *_HEADS), has_cache_scales=has_cache_scales)


_AUTO_ROUND = key_names("""
    autoround_version data_type iters amp lr minmax_lr enable_minmax_tuning enable_norm_bias_tuning
    enable_quanted_input gradient_accumulate_steps low_gpu_mem_usage nsamples scale_dtype seqlen nblocks
    enable_alg_ext enable_deterministic_algorithms
""")
"""Notes of AutoRound on its training, in what it writes in the formats of others."""
_AWQ = key_names("""
    quant_method bits group_size zero_point version format modules_to_not_convert backend do_fuse fuse_max_seq_len
    modules_to_fuse exllama_config provider sym batch_size dataset
""")


def _awq(keys: _Keys) -> Quantization:
    keys = _Keys({_RENAMED.get(key, key): value for key, value in keys.found.items()}, keys.path)
    keys.refuse_others(_AWQ | _AUTO_ROUND)
    keys.require("bits", 4, default=4)
    keys.require("data_type", "int", default="int")
    for key in ("version", "format"):
        if str(keys.get(key, "gemm")).lower() != "gemm":
            raise keys.refuse(key, "only the gemm layout is")
    keys.require("zero_point", True, default=True)
    awq = WeightFormat(layout=WeightLayout.AWQ, group_size=keys.group_size(), has_zeros=True)
    return Quantization(formats=(awq,), ignored=_not_converted(keys))


_GPTQ = key_names("""
    quant_method bits group_size desc_act sym checkpoint_format lm_head modules_to_not_convert
    damp_percent static_groups true_sequential model_name_or_path model_file_base_name model_seqlen tokenizer dataset
    batch_size block_name_to_quantize cache_block_outputs module_name_preceding_first_block pad_token_id use_cuda_fp16
    use_exllama exllama_config max_input_length disable_exllama meta pack_dtype act_group_aware backend
    modules_in_block_to_quantize quantizer hyb_act damp_auto_increment mse format method dynamic
""")


def _gptq(keys: _Keys) -> Quantization:
    keys.refuse_others(_GPTQ | _AUTO_ROUND)
    keys.require("bits", 4)
    keys.require("method", "gptq", default="gptq")
    keys.require("data_type", "int", default="int")
    keys.require("lm_head", False, default=False)
    keys.require("pack_dtype", "int32", default="int32")
    layout = keys.require("checkpoint_format", "gptq", "gptq_v2", default=keys.get("format", "gptq"))
    gptq = WeightFormat(
        layout=WeightLayout.GPTQ,
        group_size=keys.group_size(),
        has_zeros=True,  # in the file, even where they are all alike
        zero_offset=0 if layout == "gptq_v2" else 1,
        has_order=bool(keys.get("desc_act", False)),
    )
    ignored = (*_not_converted(keys), *_excluded(keys))
    return Quantization(formats=(*_overrides(keys, gptq), gptq), ignored=ignored)


def _excluded(keys: _Keys) -> tuple[str, ...]:
    """Patterns of modules that GPTQModel's `dynamic` leaves in 16 bits."""
    found = keys.inside("dynamic").found
    return _checked_patterns(keys, [name.removeprefix("-:") for name in found if name.startswith("-:")])


def _overrides(keys: _Keys, usual: WeightFormat) -> Iterator[WeightFormat]:
    """Formats of the modules for which GPTQModel's `dynamic` has settings of their own."""
    dynamic = keys.inside("dynamic")
    for name in dynamic.found:
        if name.startswith("-:"):
            continue
        own = dynamic.inside(name)
        own.refuse_others(key_names("bits group_size desc_act sym") | _AUTO_ROUND)
        own.require("bits", 4, default=4)
        changes: dict[str, Any] = {"targets": _checked_patterns(keys, [name.removeprefix("+:")])}
        if "group_size" in own.found:
            changes["group_size"] = own.group_size()
        if "desc_act" in own.found:
            changes["has_order"] = bool(own.get("desc_act"))
        yield usual.model_copy(update=changes)


def _checked_patterns(keys: _Keys, patterns: Sequence[str]) -> tuple[str, ...]:
    """Regular expressions as targets.

    Raises:
        ConfigError: one of them is none.
    """
    return _Keys({"dynamic": [f"re:{pattern}" for pattern in patterns]}, keys.path).names("dynamic")


_AUTO_ROUND_OWN = key_names("""
    quant_method bits group_size sym packing_format backend extra_config block_name_to_quantize to_quant_block_names
    act_bits act_group_size act_sym act_dynamic act_data_type model_free batch_size dataset
""")
_AUTO_ROUND_LAYOUTS = {"auto_gptq": WeightLayout.GPTQ, "auto_awq": WeightLayout.AWQ}


def _auto_round(keys: _Keys) -> Quantization:
    """What AutoRound packs as AutoGPTQ or AutoAWQ do, with settings of its own names."""
    keys.refuse_others(_AUTO_ROUND_OWN | _AUTO_ROUND)
    keys.require("bits", 4)
    keys.require("data_type", "int", default="int")
    keys.require("act_bits", 16, default=16)
    names = [f"{prefix}{name}" for prefix in ("auto_round:", "") for name in _AUTO_ROUND_LAYOUTS]
    layout = _AUTO_ROUND_LAYOUTS[keys.require("packing_format", *names).removeprefix("auto_round:")]
    usual = WeightFormat(
        layout=layout,
        group_size=keys.group_size(),
        has_zeros=True,
        zero_offset=1 if layout is WeightLayout.GPTQ else 0,
    )
    formats: list[WeightFormat] = []
    ignored: list[str] = []
    extra = keys.inside("extra_config")
    for name in extra.found:
        own, target = extra.inside(name), _as_patterns((name,))
        _Keys({"extra_config": list(target)}, keys.path).names("extra_config")  # refuses what is no pattern
        if own.require("bits", 4, 16, default=4) == 16:
            ignored += target
            continue
        own.refuse_others(_AUTO_ROUND_OWN | _AUTO_ROUND)
        own.require("data_type", "int", default="int")
        group_size = own.group_size() if own.get("group_size") else usual.group_size
        formats.append(usual.model_copy(update={"targets": target, "group_size": group_size}))
    return Quantization(formats=(*formats, usual), ignored=(*ignored, *_HEADS))


def _mxfp4(keys: _Keys) -> Quantization:
    keys.refuse_others(key_names("quant_method modules_to_not_convert dequantize"))
    mxfp4 = WeightFormat(layout=WeightLayout.MXFP4, targets=(r"re:.*\.experts\.",), group_size=BLOCK_SIZE)
    return Quantization(formats=(mxfp4,), ignored=_as_patterns(keys.names("modules_to_not_convert")))


_METHODS: dict[str, Callable[[_Keys], Quantization]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "mxfp4": _mxfp4,
}


def _block(keys: _Keys, key: str) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    value = keys.get(key)
    if isinstance(value, str) and _SIZES.fullmatch(value):  # as older versions of compressed-tensors wrote it
        value = [int(size) for size in value.split("x")]
    match value:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise keys.refuse(key, "it must be two numbers, such as [128, 128]")


def _not_converted(keys: _Keys) -> tuple[str, ...]:
    """What transformers' `modules_to_not_convert` names, and heads."""
    return (*_as_patterns(keys.names("modules_to_not_convert")), *_HEADS)


def _as_patterns(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of transformers' `modules_to_not_convert`, in which a star stands for a pattern's."""
    return tuple(f"re:{name}{_BOUNDARY}" if "*" in name and not name.startswith("re:") else name for name in names)
