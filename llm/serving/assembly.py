"""Sizes and builds what an engine consists of: the pool, the runner, the scheduler and the adapters' slots."""

import logging
from dataclasses import dataclass

from llm.checkpoint.adapter_slots import make_packer
from llm.config import EngineConfig
from llm.models.decoder import DecoderModel
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.slot_pool import SlotPool
from llm.serving.adapter_copies import AdapterCopies, num_host_places
from llm.serving.adapter_pool import AdapterPool
from llm.serving.checks import check_features, fit_context_to_pool, longest_context
from llm.serving.memory import num_pool_pages
from llm.serving.model_runner import ModelRunner
from llm.serving.ranks import Ranks
from llm.serving.runners import make_runner, num_snapshots, table_len
from llm.serving.step_packer import StepPacker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What plans, packs and runs steps, and the adapters that they may use; None if requests cannot choose one."""

    scheduler: Scheduler
    packer: StepPacker
    runner: ModelRunner
    adapters: AdapterPool | None


def build_parts(model: DecoderModel, config: EngineConfig, ranks: Ranks | None) -> EngineParts:
    """Build the parts of an engine for a model on its device, ready for a first step.

    Args:
        ranks: processes with the other parts of the model; None if `model` is all of it.

    Raises:
        ConfigError: the configuration does not fit the model, the device or the host's memory.
    """
    for note in check_features(model.config, config):
        logger.info(note)
    context_len = longest_context(model.config, config)
    packer = make_packer(model, config)
    layout = None if packer is None else packer.layout
    if ranks is None:
        num_pages = num_pool_pages(model, config, context_len, layout)
        runner = make_runner(model, config, num_pages=num_pages, context_len=context_len, adapters=layout)
    else:
        num_pages = ranks.num_pool_pages(model, context_len, layout)
        runner = ranks.make_runner(model, num_pages=num_pages, context_len=context_len, adapters=layout)
    scheduler = _make_scheduler(model, config, SlotPool(num_pages, config.page_size), context_len, runner)
    adapters = None
    if packer is not None and runner.adapters is not None:
        copies = AdapterCopies(packer, runner.adapters, num_host_places(runner.adapters, config))
        adapters = AdapterPool(copies if ranks is None else ranks.share_adapters(copies), len(runner.adapters))
    runner.warm_up()
    step_packer = StepPacker(config.batch_size(model.device.type) + 1, table_len(config, context_len))
    return EngineParts(scheduler, step_packer, runner, adapters)


def _make_scheduler(
    model: DecoderModel, config: EngineConfig, pool: SlotPool, context_len: int, runner: ModelRunner
) -> Scheduler:
    device_type = model.device.type
    num_state_snapshots = num_snapshots(model, config)
    scheduler = Scheduler(
        pool,
        max_batch_size=config.batch_size(device_type),
        max_tokens_per_step=config.token_budget(device_type),
        max_prefill_beside_decodes=config.prefill_beside_decodes(device_type),
        max_seq_len=context_len,
        windows=[group.window for group in model.page_groups],
        enable_prefix_caching=config.enable_prefix_caching and (model.config.delta is None or num_state_snapshots > 0),
        num_state_snapshots=num_state_snapshots,
        num_speculative_tokens=config.num_speculative_tokens,
        max_draws_per_step=runner.max_draws_per_step,
    )
    fit_context_to_pool(scheduler)
    return scheduler
