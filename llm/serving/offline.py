"""Runs whole batches for scripts: requests in, results out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm.errors import EngineError, InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.schemas import GenerationRequest, GenerationResult, Pooling, StepOutput, TokenLogprobs

Vectors = npt.NDArray[np.float32]


class SteppedEngine(Protocol):
    """What a batch needs of `ContinuousBatchingEngine`."""

    model: DecoderModel

    def add_request(self, request: GenerationRequest) -> str:
        """See `ContinuousBatchingEngine.add_request`."""
        ...

    def step(self) -> list[StepOutput]:
        """See `ContinuousBatchingEngine.step`."""
        ...

    def abort(self, request_id: str) -> bool:
        """See `ContinuousBatchingEngine.abort`."""
        ...


class ResultBuilder:
    """Combines one request's step outputs into its result."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] | None = None

    def add(self, output: StepOutput) -> GenerationResult | None:
        """Take the next output; returns the result if it was the last."""
        self._token_ids += output.token_ids
        self._texts.append(output.text)
        self._logprobs += output.logprobs or ()
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is None:
            return None
        return GenerationResult(
            request_id=self._request.request_id,
            token_ids=tuple(self._token_ids),
            text="".join(self._texts),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            logprobs=None if self._request.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            error=output.error,
            adapter_failure=output.adapter_failure,
            vector=output.vector,
        )


def run_to_end(
    engine: SteppedEngine, requests: Sequence[GenerationRequest], *, progress: bool
) -> list[GenerationResult]:
    """See `ContinuousBatchingEngine.generate`. Other requests in the engine run too, but their outputs are dropped."""
    builders: dict[str, ResultBuilder] = {}
    try:
        for request in requests:
            builders[engine.add_request(request)] = ResultBuilder(request)
    except InvalidRequestError:
        for request_id in builders:
            engine.abort(request_id)
        raise
    results: dict[str, GenerationResult] = {}
    with _progress_bar(enabled=progress) as bar:
        task = bar.add_task("generating", total=len(requests), tokens_per_s=0.0)
        num_tokens = 0
        while len(results) < len(builders):
            for output in engine.step():
                builder = builders.get(output.request_id)
                if builder is None:
                    continue
                num_tokens += len(output.token_ids)
                result = builder.add(output)
                if result is not None:
                    results[output.request_id] = result
                    bar.advance(task)
            elapsed = bar.tasks[task].elapsed
            bar.update(task, tokens_per_s=num_tokens / elapsed if elapsed else 0.0)
    return [results[request_id] for request_id in builders]


def vectors_of(
    engine: SteppedEngine, prompts: Sequence[str | Sequence[int]], pooling: Pooling, *, progress: bool
) -> Vectors:
    """See `ContinuousBatchingEngine.embed` and `classify`."""
    requests = [
        GenerationRequest(prompt=prompt, pooling=pooling)
        if isinstance(prompt, str)
        else GenerationRequest(prompt_token_ids=tuple(prompt), pooling=pooling)
        for prompt in prompts
    ]
    results = run_to_end(engine, requests, progress=progress)
    width = engine.model.config.num_labels if pooling is Pooling.LABELS else engine.model.hidden_size
    vectors = np.zeros((len(results), width), dtype=np.float32)
    for row, result in zip(vectors, results, strict=True):
        if result.vector is None:
            raise EngineError(f"a vector could not be computed: {result.error}")
        row[:] = np.frombuffer(result.vector, np.float32)
    return vectors


def _progress_bar(*, enabled: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens_per_s]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        transient=True,
        disable=not enabled,
    )
