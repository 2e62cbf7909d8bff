"""Names of tensors in checkpoints, whatever prefix they have.

The same tensor is `model.layers.0.mlp.up_proj.weight` in most checkpoints, `layers.0.mlp.up_proj.weight` in one that
was saved without its output head, `model.language_model.layers.0.…` or `language_model.model.layers.0.…` beside the
weights of another modality, and `module.model.layers.0.…` in one saved from a wrapper. Families name the first form.
Wrappers of single modules, such as those of torch.compile and FSDP, put a word in the middle of a name.
"""

import re
from collections.abc import Collection, Iterable, Mapping

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_BODY = "model."
_HEAD_MODULES = ("lm_head.", "score.")
_IN_LAYER = re.compile(r"((?:.*?\.)?)layers\.\d+\.")
_LAYER_NUMBER = re.compile(r"model\.layers\.(\d+)\.")
_OTHER_PARTS = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector|visual|mtp)\.")
_NOT_NEEDED = re.compile(r"(?:.+\.)?(?:rotary_emb\.\w+|masked_bias|position_ids|_extra_state)|(?:.+\.)?v_head\..+")
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def canonical_names(names: Iterable[str], wanted: Collection[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """For each name in a checkpoint, the name that families have for it; the name itself if no family's model has it.

    Args:
        names: the names of all of the checkpoint's tensors, or of all of its modules.
        wanted: the names that the model has places for, as families name them.
        renamed: see `Family`.
    """
    bare = {name: _WRAPPERS.sub("", name) for name in names}
    held = set(bare.values())
    inner = [name.removeprefix(_BODY) for name in wanted if name.startswith(_BODY)]
    prefixes = sorted({match[1] for name in held if (match := _IN_LAYER.match(name))})
    # What stands in front of most of the model's names; other parts of a checkpoint may have layers, too.
    prefix = max(prefixes, key=lambda each: sum(each + name in held for name in inner), default=_BODY)
    outer = [prefix[:end] for end in range(len(prefix) + 1) if end == 0 or prefix[end - 1] == "."]
    heads = {beginning + head: head for beginning in outer for head in _HEAD_MODULES}
    return {name: _renamed(_canonical(inside, prefix, heads), wanted, renamed) for name, inside in bare.items()}


def is_never_needed(name: str) -> bool:
    """Whether no model needs a tensor of this name.

    These are buffers that older versions of transformers saved and that follow from the configuration, what Transformer
    Engine remembers of its training in 8 bits, and the head that reinforcement learning adds to estimate values.
    """
    return _NOT_NEEDED.fullmatch(name) is not None


def is_of_other_part(name: str) -> bool:
    """Whether a tensor belongs to a part beside the language model: its vision tower, or its multi-token prediction."""
    return _OTHER_PARTS.match(name) is not None


def is_behind(name: str, num_layers: int) -> bool:
    """Whether a tensor, by its canonical name, belongs to a layer after the first `num_layers`."""
    match = _LAYER_NUMBER.match(name)
    return match is not None and int(match[1]) >= num_layers


def _renamed(name: str, wanted: Collection[str], renamed: Mapping[str, str]) -> str:
    others = (name.replace(f".{theirs}.", f".{ours}.", 1) for theirs, ours in renamed.items())
    return name if name in wanted else next((other for other in others if other in wanted), name)


def _canonical(name: str, prefix: str, heads: Mapping[str, str]) -> str:
    for theirs, head in heads.items():
        if name.startswith(theirs):
            return head + name.removeprefix(theirs)
    return _BODY + name.removeprefix(prefix) if name.startswith(prefix) else name
