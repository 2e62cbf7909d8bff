"""`ParallelRunner`: rank 0's runner, which makes the other ranks run each of its steps."""

from llm.models.adapters import AdapterMemory
from llm.parallel.ranks import RankGroup
from llm.serving.model_runner import LaunchedStep, ModelRunner
from llm.serving.step_packer import PackedPlan


class ParallelRunner:
    """The `ModelRunner` of a model that is split across several ranks.

    Args:
        runner: runs this rank's part, and draws.
        ranks: the other ranks.
    """

    def __init__(self, runner: ModelRunner, ranks: RankGroup) -> None:
        self._runner = runner
        self._ranks = ranks

    @property
    def attention_backend(self) -> str:
        """See `ModelRunner.attention_backend`."""
        return self._runner.attention_backend

    @property
    def max_steps_ahead(self) -> int:
        """See `ModelRunner.max_steps_ahead`."""
        return self._runner.max_steps_ahead

    @property
    def max_draws_per_step(self) -> int | None:
        """See `ModelRunner.max_draws_per_step`."""
        return self._runner.max_draws_per_step

    @property
    def adapters(self) -> AdapterMemory | None:
        """See `ModelRunner.adapters`."""
        return self._runner.adapters

    def run_largest(self, num_tokens: int) -> None:
        """See `ModelRunner.run_largest`; the other ranks have been asked to do the same."""
        self._runner.run_largest(num_tokens)

    def warm_up(self) -> None:
        """See `ModelRunner.warm_up`."""
        self._ranks.call("warm_up")
        self._runner.warm_up()
        self._ranks.replies()
        self._ranks.expect_beats()

    def launch(self, plan: PackedPlan) -> LaunchedStep:
        """See `ModelRunner.launch`.

        Raises:
            RankLostError: a rank is lost. No further step will run.
        """
        self._ranks.send_step(plan.arrays.fields())
        try:
            return self._runner.launch(plan)
        except Exception as error:
            # The other ranks are in the middle of this step and will not meet this rank in the next one.
            self._ranks.fail_step(error)
            self._ranks.check()
            raise
