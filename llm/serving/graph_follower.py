"""`GraphFollower`: what ranks 1 and up do in a step on a GPU."""

from functools import partial

import torch

from llm.models.adapters import AdapterMemory
from llm.serving.graph_model import GraphModel
from llm.serving.model_runner import MAX_SCORED_AT_ONCE
from llm.serving.step_arrays import StepArrays, batches


class GraphFollower:
    """The counterpart of a `GraphRunner` on another rank.

    Args:
        graphs: runs the model; used by this follower only.
    """

    def __init__(self, graphs: GraphModel) -> None:
        self._graphs = graphs

    @property
    def adapters(self) -> AdapterMemory | None:
        """See `Follower.adapters`."""
        return self._graphs.adapters

    @torch.inference_mode()
    def warm_up(self) -> None:
        """See `Follower.warm_up`."""
        if not self._graphs.captures:
            return
        self._graphs.warm_up()
        for size, are_plain in self._graphs.warm_draws():
            self._draw(size, are_plain=are_plain)

    @torch.inference_mode()
    def follow(self, arrays: StepArrays) -> None:
        """See `Follower.follow`."""
        graphs = self._graphs
        graphs.uploads.begin_step()
        graphs.launch(arrays)
        num_draws = len(arrays.draw_rows)
        scored = graphs.hidden[num_draws + len(arrays.pooled_tokens) :]
        for these in batches(len(arrays.scored_tokens), min(MAX_SCORED_AT_ONCE, graphs.draw_sizes[-1])):
            graphs.to_logits(scored[these])
        if num_draws:
            self._draw(graphs.draw_size(num_draws), are_plain=arrays.draws_plainly)

    def _draw(self, size: int, *, are_plain: bool) -> None:
        """Send rank 0 this rank's logits, and receive the tokens that it draws."""
        self._graphs.run(("draws", size, are_plain), partial(self._run_draws, size))

    def _run_draws(self, size: int) -> torch.Tensor:
        graphs, exchange = self._graphs, self._graphs.model.exchange
        assert exchange is not None, "a follower follows somebody"
        graphs.to_logits(graphs.hidden[:size])
        exchange.broadcast(graphs.pages.last_token_ids)
        return graphs.pages.last_token_ids
