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
from llm.serving.engine_setup import EngineSetup
from llm.serving.memory import num_pool_pages
from llm.serving.model_runner import ModelRunner
from llm.serving.ranks import Ranks
from llm.serving.runners import make_runner
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
    setup = EngineSetup(model, config, context_len, None if packer is None else packer.layout)
    if ranks is None:
        num_pages = num_pool_pages(setup)
        runner = make_runner(setup, num_pages)
    else:
        num_pages = ranks.num_pool_pages(setup)
        runner = ranks.make_runner(setup, num_pages)
    scheduler = _make_scheduler(setup, num_pages, runner)
    adapters = None
    if packer is not None and runner.adapters is not None:
        copies = AdapterCopies(packer, runner.adapters, num_host_places(runner.adapters, config))
        adapters = AdapterPool(copies if ranks is None else ranks.share_adapters(copies), len(runner.adapters))
    runner.warm_up()
    return EngineParts(scheduler, StepPacker(setup.max_rows + 1, setup.table_len), runner, adapters)


def _make_scheduler(setup: EngineSetup, num_pages: int, runner: ModelRunner) -> Scheduler:
    model, config = setup.model, setup.config
    scheduler = Scheduler(
        SlotPool(num_pages, config.page_size),
        max_batch_size=setup.max_rows,
        max_tokens_per_step=setup.max_tokens,
        max_prefill_beside_decodes=config.prefill_beside_decodes(model.device.type),
        max_seq_len=setup.context_len,
        windows=[group.window for group in model.page_groups],
        enable_prefix_caching=config.enable_prefix_caching and (model.config.delta is None or setup.num_snapshots > 0),
        num_state_snapshots=setup.num_snapshots,
        num_speculative_tokens=config.num_speculative_tokens,
        max_draws_per_step=runner.max_draws_per_step,
    )
    fit_context_to_pool(scheduler)
    return scheduler
