"""Sequences that wait, outside the queue, while a thread compiles their grammar."""

from concurrent.futures import FIRST_COMPLETED, Future, wait

from llm.sampling.constraint import Constraint
from llm.sampling.grammar import GrammarCompiler
from llm.sampling.json_schema import invalid_grammar
from llm.scheduling.sequence import Sequence


class CompilingRequests:
    """Sequences that wait for their grammar.

    Args:
        compiler: None if there is no tokenizer to compile for.
    """

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._futures: dict[Sequence, Future[Constraint]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def add(self, sequence: Sequence) -> None:
        """Start compiling a sequence's grammar.

        Raises:
            InvalidRequestError: this engine does not support grammars.
        """
        if self._compiler is None:
            raise invalid_grammar("this engine has no tokenizer to follow one with")
        assert sequence.request.grammar is not None, "asked for"
        self._futures[sequence] = self._compiler.start(sequence.request.grammar, sequence.request.output_token_ids)

    def discard(self, sequence: Sequence) -> bool:
        """Forget a sequence; False if it does not wait here."""
        return self._futures.pop(sequence, None) is not None

    def take(self, timeout_s: float) -> list[tuple[Sequence, str | None]]:
        """The sequences whose compilation has ended, each with the error if it failed; waits for the first one."""
        done, _ = wait(self._futures.values(), timeout_s, return_when=FIRST_COMPLETED)
        taken: list[tuple[Sequence, str | None]] = []
        for sequence, future in list(self._futures.items()):
            if future in done:
                del self._futures[sequence]
                error = future.exception()
                if error is None:
                    sequence.constraint = future.result()
                taken.append((sequence, None if error is None else str(error)))
        return taken
