"""The interface that a replica needs of an engine, and the factory that makes one."""

import os
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from deployments.channel.messages import EngineInfo
from deployments.fingerprint import fingerprint_of
from deployments.model_config import DType, EngineKind, ServedModelConfig
from deployments.replica.emulated_engine import VECTOR_SIZE, EmulatedEngine
from deployments.replica.model_memory import check_fits, slot_bytes
from llm.errors import ConfigError
from llm.scheduling.slot_pool import SlotPool
from llm.serving.schemas import EngineStats, GenerationRequest, StepOutput

PROGRESS_MARK = "weights loaded, of bytes:"
_PROGRESS_INTERVAL_S = 0.5


class EngineScheduler(Protocol):
    """The part of a scheduler that the engine loop looks at."""

    @property
    def pool(self) -> SlotPool:
        """The pool that knows what is where in the KV memory."""
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

    @property
    def is_classifier(self) -> bool:
        """Whether its model has a head for labels, and none for tokens."""
        ...

    @property
    def failure(self) -> str | None:
        """Why it can run no further step, even if no step has failed yet; None if all is well."""
        ...

    def close(self) -> None:
        """End the processes that hold parts of the model. No step can run after this."""
        ...

    def add_request(self, request: GenerationRequest) -> str:
        """Accept a request or raise InvalidRequestError."""
        ...

    def unload_adapter(self, digest: str) -> bool:
        """Give up an adapter as soon as no accepted request needs it; False if it is not held."""
        ...

    def abort(self, request_id: str) -> bool:
        """Give up a request."""
        ...

    def step(self) -> Sequence[StepOutput]:
        """Run one step."""
        ...

    def stats(self) -> EngineStats:
        """State between two steps."""
        ...


def num_cores() -> int:
    """Number of cores that this process may use: those of its affinity, or fewer if a container's quota says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def make_engine(config: ServedModelConfig) -> tuple[Engine, EngineInfo]:
    """Load the model, or make the emulated engine.

    Raises:
        CheckpointError, ConfigError: the checkpoint or the configuration is wrong; the message has the fix.
    """
    if config.engine_kind is EngineKind.EMULATED:
        return _make_emulated(config)
    return _make_torch(config)


def _make_emulated(config: ServedModelConfig) -> tuple[Engine, EngineInfo]:
    from llm.checkpoint.generation_defaults import load_vocab_size
    from llm.checkpoint.hub import resolve_model_path
    from llm.checkpoint.vector_defaults import load_vector_defaults

    time.sleep(config.emulation.start_s)
    directory = resolve_model_path(config.model)
    vocab_size, labels = load_vocab_size(directory), load_vector_defaults(directory).labels
    num_labels = 0 if labels is None else len(labels.names)
    fingerprint = fingerprint_of(config)
    version = zlib.crc32(fingerprint.encode())
    engine = EmulatedEngine(
        config.engine, config.emulation, vocab_size=vocab_size, version=version, num_labels=num_labels
    )
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
        vector_size=VECTOR_SIZE,
        num_labels=num_labels,
    )


def _report_progress() -> Callable[[int, int], None]:
    """Prints the loaded and total bytes of weights about twice a second; Ray forwards it to the terminal."""
    printed_at = 0.0

    def report(done: int, total: int) -> None:
        nonlocal printed_at
        now = time.monotonic()
        if now - printed_at > _PROGRESS_INTERVAL_S or done == total:
            printed_at = now
            print(f"{PROGRESS_MARK} {done} {total}", flush=True)

    return report


def _check_gpus(config: ServedModelConfig) -> None:
    """Check that this replica's GPUs can hold the model, before it is read.

    Raises:
        ConfigError: they cannot, or there are too few.
    """
    import torch

    from llm.checkpoint.hub import resolve_model_path
    from llm.checkpoint.loading import check_checkpoint

    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    num_gpus = config.engine.tensor_parallel_size
    if device.type != "cuda":
        return
    if num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"engine.tensor_parallel_size: {num_gpus} needs as many GPUs, and a replica sees "
            f"{torch.cuda.device_count()}; set it lower, or replicas.num_gpus higher"
        )
    gpu_bytes = int(torch.cuda.get_device_properties(device).total_memory * config.gpu_share)
    if config.gpu_share < 1:  # whatever happens here, memory runs out here, and not in the other engines on the GPU
        torch.cuda.set_per_process_memory_fraction(config.gpu_share, device.index)
    check_fits(config, check_checkpoint(resolve_model_path(config.model)).config, gpu_bytes)


def _make_torch(config: ServedModelConfig) -> tuple[Engine, EngineInfo]:
    import torch

    from llm.serving.engine import ContinuousBatchingEngine
    from llm.serving.engine_setup import EngineSetup

    # Ray sets OMP_NUM_THREADS=1 for replicas with less than a CPU.
    torch.set_num_threads(config.replicas.torch_threads or max(1, num_cores() // config.replicas.most_replicas))
    _check_gpus(config)
    dtype = None if config.dtype is DType.AUTO else getattr(torch, config.dtype)
    own_share = {"gpu_share": config.gpu_share} if config.gpu_share < 1 else {}
    engine = ContinuousBatchingEngine.from_pretrained(
        config.model,
        config=config.engine.model_copy(update=own_share),
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
    setup = EngineSetup(model, engine.config, engine.max_seq_len)
    slots_bytes = engine.num_slots * slot_bytes(model.held, setup.kv_cache_dtype.itemsize)
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
        kv_cache_bytes=slots_bytes + setup.states_bytes,
        vector_size=model.hidden_size,
        num_labels=model.config.num_labels,
        num_gpus=config.engine.tensor_parallel_size,
    )
