"""What a replica needs of an engine, and how it gets one."""

import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from deployments.channel.messages import EngineInfo
from deployments.config import AppConfig, DType, EngineKind
from deployments.fingerprint import fingerprint_of
from deployments.replica.emulated_engine import EmulatedEngine
from llm.config import ModelConfig
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import EngineStats, GenerationRequest, StepOutput

PROGRESS_MARK = "weights loaded, of bytes:"
_PROGRESS_INTERVAL_S = 0.5


class EngineScheduler(Protocol):
    """The part of a scheduler that the engine loop looks at."""

    @property
    def pool(self) -> SlotPool:
        """What is where in the KV memory."""
        ...

    @property
    def has_pending_work(self) -> bool:
        """Whether a step would do anything."""
        ...


class Engine(Protocol):
    """`ContinuousBatchingEngine` as the engine loop uses it. One thread calls it."""

    @property
    def scheduler(self) -> EngineScheduler:
        """Tells whether there is work, and what the prefix cache holds."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Longest sequence in tokens."""
        ...

    @property
    def num_slots(self) -> int:
        """Tokens that the pool holds."""
        ...

    def add_request(self, request: GenerationRequest) -> str:
        """Accept a request or raise InvalidRequestError."""
        ...

    def abort(self, request_id: str) -> bool:
        """Give a request up."""
        ...

    def step(self) -> Sequence[StepOutput]:
        """Run one step."""
        ...

    def stats(self) -> EngineStats:
        """State between two steps."""
        ...


def slot_bytes(model: ModelConfig, itemsize: int) -> int:
    """Bytes of one token's keys and values, or latents, in all layers with attention."""
    return model.num_attention_layers * model.slot_width * itemsize


def num_cores() -> int:
    """Cores that this process may use: those of its affinity, less where a container's quota says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def make_engine(config: AppConfig) -> tuple[Engine, EngineInfo]:
    """Load the model, or make the emulated engine.

    Raises:
        CheckpointError, ConfigError: what is wrong with the checkpoint or the configuration, with the fix.
    """
    if config.engine_kind is EngineKind.EMULATED:
        return _make_emulated(config)
    return _make_torch(config)


def _make_emulated(config: AppConfig) -> tuple[Engine, EngineInfo]:
    from llm.checkpoint.generation_defaults import load_vocab_size
    from llm.checkpoint.hub import resolve_model_path

    time.sleep(config.emulation.start_s)
    vocab_size = load_vocab_size(resolve_model_path(config.model))
    fingerprint = fingerprint_of(config)
    version = zlib.crc32(fingerprint.encode())
    engine = EmulatedEngine(config.engine, config.emulation, vocab_size=vocab_size, version=version)
    return engine, EngineInfo(
        model=config.model_name,
        max_seq_len=engine.max_seq_len,
        num_slots=engine.num_slots,
        page_size=config.engine.page_size,
        max_step_tokens=config.engine.token_budget("cuda"),
        vocab_size=vocab_size,
        device="none",
        dtype="none",
        backend="emulated",
        fingerprint=fingerprint,
    )


def _report_progress() -> Callable[[int, int], None]:
    """Prints the bytes of weights loaded and their total about twice a second; Ray brings it to the terminal."""
    printed_at = 0.0

    def report(done: int, total: int) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if now - printed_at > _PROGRESS_INTERVAL_S or done == total:
            printed_at = now
            print(f"{PROGRESS_MARK} {done} {total}", flush=True)

    return report


def _make_torch(config: AppConfig) -> tuple[Engine, EngineInfo]:
    import torch

    from llm.serving.engine import ContinuousBatchingEngine

    # Ray sets OMP_NUM_THREADS=1 for replicas with less than a CPU.
    torch.set_num_threads(config.replicas.torch_threads or max(1, num_cores() // config.replicas.most_replicas))
    dtype = None if config.dtype is DType.AUTO else getattr(torch, config.dtype)
    engine = ContinuousBatchingEngine.from_pretrained(
        config.model,
        config=config.engine,
        device=config.device,
        dtype=dtype,
        with_tokenizer=False,
        lora=config.lora,
        progress=_report_progress(),
    )
    if config.emulation.fault_dir is not None:
        from deployments.replica.fault_injection import lose_device_on_demand

        lose_device_on_demand(engine, config.emulation.fault_dir)
    model = engine.model
    kv_itemsize = 1 if config.engine.kv_cache_dtype == "fp8" else model.dtype.itemsize
    return engine, EngineInfo(
        model=config.model_name,
        max_seq_len=engine.max_seq_len,
        num_slots=engine.num_slots,
        page_size=config.engine.page_size,
        max_step_tokens=config.engine.token_budget(model.device.type),
        vocab_size=model.config.vocab_size,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        backend=engine.attention_backend,
        fingerprint=fingerprint_of(config),
        weight_bytes=sum(weight.nbytes for weight in model.parameters()),
        kv_cache_bytes=engine.num_slots * slot_bytes(model.config, kv_itemsize)
        + (engine.scheduler.max_batch_size + 1) * model.config.state_bytes(model.dtype.itemsize),
    )
