"""One directory with a PEFT adapter: whether it has changed, whether it can be served, and which adapter it is."""

import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from llm.checkpoint.adapter_digest import ADAPTER_FILES, adapter_digest
from llm.checkpoint.hub import find_local_checkpoint
from llm.checkpoint.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig, refuse_pickle
from llm.config.adapters import MAX_RANK
from llm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from llm.config import ModelConfig

Signature = tuple[tuple[int, ...], ...]
"""What changes whenever one of an adapter's files does."""
_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class AdapterRules:
    """What an adapter must be like to be served.

    Attributes:
        max_rank: the largest rank that the engines take.
        max_bytes: the most bytes that its weights may have.
        model: the model whose shape it must fit, if its checkpoint is on this machine; None for any.
        with_experts: whether the engines take adapters on experts that routers choose among.
    """

    max_rank: int
    max_bytes: int
    model: str | None = None
    with_experts: bool = False


def signature_of(directory: Path) -> Signature | None:
    """What changes when the directory's adapter does; None where there is no adapter_config.json."""
    found: list[tuple[int, ...]] = []
    for name in ADAPTER_FILES:
        try:
            status = os.stat(directory / name)
        except OSError as error:
            if name == CONFIG_FILE and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                return None
            found.append((error.errno or 0,))
            continue
        found.append(
            (status.st_mode, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        )
    return tuple(found)


def read_adapter(directory: Path, rules: AdapterRules) -> str:
    """Check an adapter and return its digest. It reads all of it: not for an event loop.

    Raises:
        CheckpointError, ConfigError: it cannot be served; one line with the reason. The reason may be that its files
            changed meanwhile.
    """
    before = signature_of(directory)
    _check_files(directory, rules)
    _check_rank(directory / CONFIG_FILE, rules.max_rank)
    _check_header(directory / WEIGHTS_FILE)
    checkpoint = find_local_checkpoint(rules.model) if rules.model is not None else None
    if checkpoint is not None:
        from llm.checkpoint.adapter import check_adapter  # brings PyTorch, which routers do without

        check_adapter(_shape_of(checkpoint), directory, max_rank=rules.max_rank, with_experts=rules.with_experts)
    digest = adapter_digest(directory)
    if signature_of(directory) != before:
        raise CheckpointError(f"{directory} is being changed; try again once its files are complete")
    return digest


def created_at(directory: Path) -> int:
    """When its weights were written, in seconds since 1970; 0 if they are gone."""
    try:
        return int((directory / WEIGHTS_FILE).stat().st_mtime)
    except OSError:
        return 0


def _check_files(directory: Path, rules: AdapterRules) -> None:
    """Check that both files are there, and that reading them ends."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; give the one that holds {CONFIG_FILE}")
    config, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    refuse_pickle(weights)
    for path in (config, weights):
        try:
            status = path.stat()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise CheckpointError(f"{path} cannot be read ({reason}); is {directory} a PEFT adapter?") from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a file")
        if path == config and status.st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has {status.st_size} bytes, too many for the configuration of an adapter")
        if status.st_size > rules.max_bytes:
            raise ConfigError(
                f"{path} has {status.st_size / (1 << 30):.1f} GiB, more than engine.adapter_host_gib; raise that"
            )


def _check_rank(path: Path, max_rank: int) -> None:
    rank = PeftConfig.read(path).largest_rank
    if rank > MAX_RANK:
        raise ConfigError(f"{path}: rank {rank} is more than engines take, which is {MAX_RANK}; merge this adapter")
    if rank > max_rank:
        raise ConfigError(
            f"{path}: rank {rank} is more than engine.max_adapter_rank: {max_rank}; raise that to at least {rank}"
        )


def _check_header(path: Path) -> None:
    """Check that the weights are a whole safetensors file; a file that is cut short is not."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            is_empty = not any(".lora_" in name for name in file.keys())  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); save the adapter again") from error
    if is_empty:
        raise CheckpointError(f"{path} holds no LoRA factors; save the adapter again")


@lru_cache(maxsize=64)
def _shape_of(checkpoint: Path) -> "ModelConfig":
    from llm.checkpoint.loading import check_checkpoint

    return check_checkpoint(checkpoint).config
