"""`Preparation`: what a request waits for before the scheduler may run it, its grammar and its adapter."""

from llm.sampling.grammar import GrammarCompiler
from llm.scheduling.scheduler import Scheduler
from llm.scheduling.sequence import Sequence
from llm.schemas import StepFailure, StepOutput
from llm.serving.adapter_pool import AdapterPool
from llm.serving.compiling import CompilingRequests
from llm.serving.output_processor import failed

_IDLE_WAIT_S = 0.005
"""How long a step waits for a grammar or an adapter when there is nothing else to do."""


class Preparation:
    """Brings sequences into the scheduler's queue: at once, or once their grammar and then their adapter is there.

    Args:
        grammars: None if there is no tokenizer to compile for.
        adapters: None if requests cannot choose one.
    """

    def __init__(self, scheduler: Scheduler, grammars: GrammarCompiler | None, adapters: AdapterPool | None) -> None:
        self._scheduler = scheduler
        self._compiling = CompilingRequests(grammars)
        self._adapters = adapters

    def add(self, sequence: Sequence) -> None:
        """Begin what a new sequence needs, or queue it if it needs nothing.

        Raises:
            InvalidRequestError: this engine does not support grammars. Nothing is accepted.
        """
        if sequence.request.grammar is not None:
            self._compiling.add(sequence)
            self._scheduler.preparing.add(sequence)
        else:
            self._add_compiled(sequence)

    def proceed(self) -> list[StepOutput]:
        """Queue the sequences that are ready; the last outputs of those whose grammar or adapter could not be made."""
        scheduler = self._scheduler
        if not scheduler.preparing:
            return []
        failures = []
        is_idle = not scheduler.num_running and scheduler.num_waiting == len(scheduler.preparing)
        timeout_s = _IDLE_WAIT_S if is_idle else 0
        for sequence, error in self._compiling.take(timeout_s) if self._compiling else ():
            if error is None:
                self._add_compiled(sequence)
            else:
                failures.append(failed(sequence, error))
        for sequence, failure in self._adapters.take(timeout_s) if self._adapters else ():
            if failure is None:
                scheduler.add(sequence)
            else:
                lost = StepFailure.DEVICE if failure.kind is None else None
                failures.append(failed(sequence, failure.message, lost, failure.kind))
        return failures

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, whether or not it was ready."""
        self._compiling.discard(sequence)
        if self._adapters is not None and sequence.request.adapter is not None:
            self._adapters.release(sequence)

    def _add_compiled(self, sequence: Sequence) -> None:
        """Let a sequence that needs no grammar any more wait for its adapter, or queue it if it needs none."""
        if self._adapters is not None and sequence.request.adapter is not None:
            self._adapters.add(sequence)
            self._scheduler.preparing.add(sequence)
        else:
            self._scheduler.add(sequence)
