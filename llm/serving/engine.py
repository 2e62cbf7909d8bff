"""`ContinuousBatchingEngine`: runs many requests through one model, one step at a time."""

import logging
from collections import deque
from collections.abc import Iterable, Sequence as SequenceOf
from pathlib import Path
from typing import Self

import torch

from llm.checkpoint.generation_defaults import load_generation_defaults
from llm.checkpoint.hub import resolve_model_path
from llm.checkpoint.loading import Progress
from llm.config import EngineConfig
from llm.errors import ConfigError, InvalidRequestError
from llm.models.decoder import DecoderModel
from llm.sampling.grammar import GrammarCompiler
from llm.scheduling.sequence import Sequence, SequenceStatus, StepPlan
from llm.schemas import (
    EngineStats,
    GenerationRequest,
    GenerationResult,
    Pooling,
    StepFailure,
    StepOutput,
)
from llm.serving import device_health
from llm.serving.assembly import build_parts
from llm.serving.checks import check_request, check_task, with_overrides, without_padding
from llm.serving.model_loading import ModelSource
from llm.serving.model_runner import LaunchedStep
from llm.serving.offline import Vectors, run_to_end, vectors_of
from llm.serving.output_processor import OutputProcessor, failed
from llm.serving.preparation import Preparation
from llm.serving.ranks import Ranks, load_with_ranks
from llm.tokenization.hf_tokenizer import HFTokenizer
from llm.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class ContinuousBatchingEngine:
    """Iteration-level scheduling (Orca, Yu et al. 2022) over a paged slot pool (PagedAttention, Kwon et al. 2023).

    Requests join and leave between steps; prefill chunks and decodes share a step under one token budget. Not
    thread-safe: one thread calls it.

    Args:
        model: moved to `device` and put in evaluation mode.
        tokenizer: None for an engine that takes and returns only token ids.
        device: where to run; None to stay where the model is.
        max_batch_size, max_seq_len: shorthands that override the same fields of `config`.
        config: memory and batching.
        eos_token_ids: ids that end an answer; None for the tokenizer's own.
        grammars: compiler for structured output; None to make one for the tokenizer, if it supports that.
        ranks: processes with the other parts of the model, if `model` is only rank 0's; the engine ends them.

    Raises:
        ConfigError: the configuration does not fit the model or the device.
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: Tokenizer | None = None,
        device: torch.device | str | None = None,
        max_batch_size: int | None = None,
        max_seq_len: int | None = None,
        *,
        config: EngineConfig | None = None,
        eos_token_ids: Iterable[int] | None = None,
        grammars: GrammarCompiler | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config = with_overrides(config or EngineConfig(), max_batch_size, max_seq_len)
        self.model = model.to(device or model.device).eval()
        self.tokenizer = tokenizer
        self._ranks = ranks
        if config.tensor_parallel_size > 1 and ranks is None:
            raise ConfigError("tensor_parallel_size needs a model that ranks can load: use from_pretrained")
        if eos_token_ids is None:
            eos_token_ids = tokenizer.eos_token_ids if tokenizer else ()
        self.eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < model.config.vocab_size)
        parts = build_parts(self.model, config, ranks)
        self.scheduler, self.runner, self._adapters = parts.scheduler, parts.runner, parts.adapters
        self._packer = parts.packer
        if grammars is None and isinstance(tokenizer, HFTokenizer):
            grammars = GrammarCompiler(tokenizer, model.config.vocab_size)
        self._preparation = Preparation(self.scheduler, grammars, self._adapters)
        self._outputs = OutputProcessor(tokenizer)
        self._in_flight: deque[tuple[StepPlan, LaunchedStep]] = deque()
        self._sequences: dict[str, Sequence] = {}
        logger.info(
            "engine ready: %s %s, attention backend %s, %d slots in pages of %d, context %d tokens",
            model.device, model.dtype, self.attention_backend, self.num_slots, config.page_size, self.max_seq_len,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: EngineConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        with_tokenizer: bool = True,
        random_weights: bool = False,
        lora: str | Path | None = None,
        progress: Progress = True,
    ) -> Self:
        """Make an engine for a Hugging Face checkpoint: a directory, or a Hub id if the network is available.

        Args:
            device: None for the GPU if there is one, otherwise the CPU.
            dtype: None for bfloat16 on a GPU and float32 on a CPU.
            with_tokenizer: False for an engine that handles only token ids.
            random_weights: fill the checkpoint's shape with random numbers, and read no weights.
            lora: directory of a PEFT adapter to merge into the weights.
            progress: show a progress bar while weights load; or a function called with the bytes done and their total.

        Raises:
            CheckpointError, ConfigError: something is wrong with the checkpoint; the message says how to fix it.
            RankLostError: a process that should hold a part of the model has ended.
        """
        directory = resolve_model_path(str(path))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.empty(0, device=device).device  # with the number of the GPU, which "cuda" leaves out
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        source = ModelSource(
            directory=str(directory), device=str(device), dtype=str(dtype).removeprefix("torch."),
            lora=None if lora is None else str(lora), random_weights=random_weights,
        )  # fmt: skip
        model, ranks = load_with_ranks(source, config or EngineConfig(), progress=progress)
        if with_tokenizer or (directory / "tokenizer.json").is_file():
            # Read even if it is not kept: answers end the same with and without text, and grammars need it.
            tokenizer = HFTokenizer.from_pretrained(directory)
            eos_token_ids = tokenizer.eos_token_ids
            grammars = GrammarCompiler(tokenizer, model.config.vocab_size)
        else:
            tokenizer, grammars = None, None
            eos_token_ids = load_generation_defaults(directory).eos_token_ids
        tokenizer = tokenizer if with_tokenizer else None
        try:
            return cls(model, tokenizer, config=config, eos_token_ids=eos_token_ids, grammars=grammars, ranks=ranks)
        except BaseException:
            if ranks is not None:
                ranks.close()
            raise

    @property
    def max_seq_len(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""
        return self.scheduler.max_seq_len

    @property
    def num_slots(self) -> int:
        """Tokens whose keys and values the pool holds in every layer; more if layers have windows."""
        return self.scheduler.pool.num_pages // len(self.scheduler.windows) * self.scheduler.pool.page_size

    @property
    def is_classifier(self) -> bool:
        """Whether the model gives labels to texts, and nothing else: every request must ask for them."""
        return self.model.config.classifier is not None

    @property
    def failure(self) -> str | None:
        """Why the engine can run no further step, even if none has failed yet: a rank is lost. None if all is well."""
        return None if self._ranks is None else self._ranks.failure

    @property
    def rank_process_ids(self) -> list[int]:
        """Ids of the processes that hold the other parts of the model; empty if this one holds all of it."""
        return [] if self._ranks is None else self._ranks.group.process_ids

    def close(self) -> None:
        """End the processes that hold the other parts of the model, and all threads. No step can run after this."""
        if self._adapters is not None:
            self._adapters.close()
        if self._ranks is not None:
            self._ranks.close()

    @property
    def attention_backend(self) -> str:
        """Name of the attention backend in use."""
        return self.runner.attention_backend

    def add_request(self, request: GenerationRequest) -> str:
        """Accept a request; its tokens come out of `step`. Returns its id.

        Raises:
            InvalidRequestError: the request can never be served as asked. Nothing is accepted.
        """
        check_task(request, self.model.config)
        prompt_ids = self._prompt_ids(request)
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        sequence = Sequence(request, prompt_ids, self.eos_token_ids, self.scheduler.pool.page_size)
        check_request(
            request, prompt_ids, sequence.end_ids,
            vocab_size=self.model.config.vocab_size, max_seq_len=self.max_seq_len, has_tokenizer=bool(self.tokenizer),
        )  # fmt: skip
        if request.adapter is not None and self._adapters is None:
            raise InvalidRequestError(
                f"this engine has no room for the adapter {request.adapter.name!r}: set max_adapters", param="adapter"
            )
        self._preparation.add(sequence)
        self._outputs.begin(request)
        self._sequences[request.request_id] = sequence
        return request.request_id

    def step(self) -> list[StepOutput]:
        """Launch one step and return what a step produced, one output for each request that progressed.

        With a runner that runs ahead, the outputs belong to an earlier step: they arrive `max_steps_ahead` calls after
        the one that launched it, and the first calls return none. Keep calling it while the scheduler has pending work.

        If the model fails, the requests of that step end with `FinishReason.ERROR`, their outputs say what failed
        (`step_failure`), and all other requests continue.
        """
        outputs = [*self._preparation.proceed(), *self._run_step()]
        for output in outputs:
            if output.finish_reason is not None:
                self._end(self._sequences[output.request_id])
        return outputs

    def unload_adapter(self, digest: str) -> bool:
        """Forget an adapter as soon as no accepted request needs it; False if the engine does not hold it."""
        return self._adapters is not None and self._adapters.unload(digest)

    def abort(self, request_id: str) -> bool:
        """Stop a request at once; False if it has ended or never existed. It yields no further output."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    def embed(
        self, prompts: SequenceOf[str | SequenceOf[int]], *, pooling: Pooling = Pooling.LAST, progress: bool = True
    ) -> Vectors:
        """Compute a vector for each prompt, a text or token ids: (prompts, hidden_size) float32, each of length 1.

        Raises:
            InvalidRequestError: a prompt is empty, too long or holds ids past the vocabulary; none is run.
            EngineError: the model failed.
        """
        return vectors_of(self, prompts, pooling, progress=progress)

    def classify(self, prompts: SequenceOf[str | SequenceOf[int]], *, progress: bool = True) -> Vectors:
        """Compute the logits of a classifier's labels for each prompt, a text or token ids: (prompts, num_labels)
        float32.

        Raises:
            InvalidRequestError: as in `embed`; or the model is no classifier.
            EngineError: the model failed.
        """
        return vectors_of(self, prompts, Pooling.LABELS, progress=progress)

    def generate(self, requests: SequenceOf[GenerationRequest], *, progress: bool = True) -> list[GenerationResult]:
        """Run requests to their end and return their results in the same order.

        Args:
            progress: show a progress bar on a terminal.

        Raises:
            InvalidRequestError: a request can never be served; none is run.
        """
        return run_to_end(self, requests, progress=progress)

    def stats(self) -> EngineStats:
        """State of the engine between two steps."""
        pool, num_groups = self.scheduler.pool, len(self.scheduler.windows)
        # In pages of all groups of layers together; a partly used one counts as used.
        num_pages = pool.num_pages // num_groups
        num_used = min(-(-pool.num_used // num_groups), num_pages)
        num_cached = min(pool.num_cached // num_groups, num_pages - num_used)
        return EngineStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            num_waiting_tokens=self.scheduler.num_waiting_tokens,
            num_free_pages=num_pages - num_used - num_cached,
            num_used_pages=num_used,
            num_cached_pages=num_cached,
            num_pages=num_pages,
            page_size=pool.page_size,
            num_preemptions=self.scheduler.num_preemptions,
            num_generated_tokens=self._outputs.num_generated_tokens,
            num_prompt_tokens=self._outputs.num_prompt_tokens,
            num_cached_prompt_tokens=self._outputs.num_cached_prompt_tokens,
            max_rows=self.scheduler.max_batch_size,
            num_proposed_tokens=self.scheduler.num_proposed_tokens,
            num_accepted_tokens=self.scheduler.num_accepted_tokens,
            adapters=() if self._adapters is None else self._adapters.digests,
        )

    def _prompt_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        prompt_ids, classifier = request.prompt_token_ids, self.model.config.classifier
        if prompt_ids is None:
            if self.tokenizer is None:
                raise InvalidRequestError("this engine has no tokenizer; give prompt_token_ids", param="prompt")
            assert request.prompt is not None, "the schema wants one of the two"
            prompt_ids = tuple(self.tokenizer.encode(request.prompt))
        return prompt_ids if classifier is None else without_padding(prompt_ids, classifier.pad_token_id)

    def _run_step(self) -> list[StepOutput]:
        """Launch a step, and finish the oldest one if as many as possible are in flight."""
        plan = self.scheduler.schedule()
        if plan.parts:
            try:
                self._in_flight.append((plan, self.runner.launch(self._packer.pack(plan.parts))))
            except Exception as error:  # the edge of a step: any error concerns only these requests
                logger.exception("a step of %d sequences could not be launched", len(plan.parts))
                return self._fail(plan, error)
            if len(self._in_flight) <= self.runner.max_steps_ahead:
                return []
        return self._finish_oldest_step() if self._in_flight else []

    def _finish_oldest_step(self) -> list[StepOutput]:
        """Wait for the oldest step in flight and process its results."""
        plan, launched = self._in_flight.popleft()
        try:
            draws, vectors, scores = launched.draws(), launched.vectors(), launched.scores()
        except Exception as error:  # as in `_run_step`
            logger.exception("a step of %d sequences failed", len(plan.parts))
            return self._fail(plan, error)
        self._outputs.add_prompt_logprobs(scores)
        events = self.scheduler.apply(plan, [draw.token_id for draw in draws])
        return self._outputs.process(events, draws, vectors)

    def _fail(self, plan: StepPlan, error: Exception) -> list[StepOutput]:
        """The last outputs of the requests of a step that failed."""
        sequences = [part.sequence for part in plan.parts if part.sequence.status is not SequenceStatus.FINISHED]
        message = f"{type(error).__name__}: {error}"
        is_lost = self.failure is not None or device_health.is_lost(self.model.device)
        failure = StepFailure.DEVICE if is_lost else StepFailure.STEP
        return [failed(sequence, message, failure) for sequence in sequences]

    def _end(self, sequence: Sequence) -> None:
        """Forget a request; its pages become free at once."""
        self.scheduler.finish(sequence)
        self._preparation.discard(sequence)
        self._outputs.discard(sequence.request_id)
        del self._sequences[sequence.request_id]
