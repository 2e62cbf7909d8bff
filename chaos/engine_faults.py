"""F4 and F9: faults of one engine, which need neither Ray nor HTTP."""

import asyncio
import time
from pathlib import Path
from typing import Any

import torch

from chaos.fleet import Outcome
from deployments.channel.messages import FailureKind
from deployments.replica.engine_loop import EngineLoop
from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import FinishReason, GenerationRequest

DEMO = Path(__file__).parent.parent / "configs" / "demo"


def _engine(**config: Any) -> ContinuousBatchingEngine:
    # Threads of a pool wait for each other in each of a small model's operations: a hundred times slower on busy cores.
    torch.set_num_threads(1)
    return ContinuousBatchingEngine.from_pretrained(
        DEMO, device="cpu", config=EngineConfig.model_validate(config), progress=False
    )


async def f4_forward_fails(_: str) -> Outcome:
    """The model's forward pass raises after ten calls, once, as a GPU that is out of memory does."""
    engine = _engine(max_batch_size=8, num_pages=512)
    launch, num_calls, failed_at = engine.runner.launch, 0, 0.0

    def fail_once(plan: Any) -> Any:
        nonlocal num_calls, failed_at
        num_calls += 1
        if num_calls == 10:
            failed_at = time.monotonic()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (simulated)")
        return launch(plan)

    engine.runner.launch = fail_once  # type: ignore[method-assign]
    loop = EngineLoop(engine, "replica")
    loop.start()
    try:
        requests = [GenerationRequest(prompt=f"{i} + 2 =", max_new_tokens=100, ignore_eos=True) for i in range(12)]
        replies = await asyncio.gather(*(loop.generate(request) for request in requests[:8]))
        answered_s = time.monotonic() - failed_at
        failed = [reply for reply in replies if reply.failure is not None and reply.failure.kind is FailureKind.FAILED]
        after = await asyncio.gather(*(loop.generate(request) for request in requests[8:]))
        whole = [reply for reply in after if reply.end is not None and reply.end.reason is FinishReason.LENGTH]
        used = engine.stats().num_used_pages
    finally:
        loop.stop()
    figure = (
        f"{len(failed)} requests of the step handed back for another replica, all after {answered_s:.2f} s; "
        f"{len(whole)} of 4 later ones whole; {used} pages in use"
    )
    return Outcome(figure, len(failed) == 8, answered_s < 2, len(whole) == 4, used == 0)


async def f9_small_pool(_: str, num_requests: int = 24, num_tokens: int = 120) -> Outcome:
    """A slot pool of a tenth of the demand: everything finishes, with the text that it has alone."""
    requests = [
        GenerationRequest(prompt=f"Count from {i} on: ", max_new_tokens=num_tokens, temperature=0, ignore_eos=True)
        for i in range(num_requests)
    ]
    alone = _engine(max_batch_size=1, num_pages=64)
    expected = [alone.generate([request], progress=False)[0].text for request in requests]
    demand = sum(-(-(20 + request.max_new_tokens) // 16) for request in requests)
    small = _engine(max_batch_size=num_requests, num_pages=demand // 10)
    results = await asyncio.to_thread(small.generate, requests, progress=False)
    same = sum(result.text == text for result, text in zip(results, expected, strict=True))
    num_preemptions = small.stats().num_preemptions
    figure = f"{same} of {len(requests)} with the text made alone, {num_preemptions} preemptions, {demand // 10} pages"
    return Outcome(figure, same == len(requests), num_preemptions > 0)
