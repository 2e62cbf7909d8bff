"""Pipelines over nodes, simulated: how long stages stand idle, by nodes, groups of rows and load. One JSON line each.

    python -m benchmarks.pipeline_sim [--nodes 2 4] [--rows 256] [--seconds 20]

Each node is a stage with an equal share of the layers. A row's next step needs the token that its last one drew, which
only the last stage knows: rows are therefore in groups, and each group has one step under way at a time. A step
is sent from stage to stage as soon as it is done there, and its tokens go back to the first. Stages take
their time from a roofline: reading the weights or multiplying with them, whichever is longer, and something fixed.
`idle` is the share of the stages' time in which they do nothing, `of one node` the tokens a second by those of a single
node that had the memory for all layers, times the number of nodes: 1 would be perfect.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """A model on a node, were all of its layers there; the defaults are 405 billion numbers in FP8 on eight H200.

    Attributes:
        read_ms: to read all weights, at four fifths of the memory's bandwidth.
        token_us: to multiply one token with all of them, at six tenths of the peak.
        fixed_ms: of a stage, for all that is launched, waited for and summed in it, whatever its layers.
        hidden_bytes: of the residual stream of one token, which is what stages send each other.
    """

    read_ms: float = 13.2
    token_us: float = 85.0
    fixed_ms: float = 0.5
    hidden_bytes: int = 2 * 16_384

    def stage_ms(self, num_tokens: int, num_stages: int) -> float:
        """Of one stage's share of a step."""
        return max(self.read_ms, num_tokens * self.token_us / 1e3) / num_stages + self.fixed_ms


@dataclass(frozen=True, slots=True)
class Link:
    """Between two nodes: a network card of 400 Gbit/s a GPU, each of which sends its eighth of the hidden states.

    Attributes:
        latency_ms: of a message of any size, what both ends do for it included.
        bytes_per_ms: of all cards of a node together.
    """

    latency_ms: float = 0.03
    bytes_per_ms: float = 8 * 45e6

    def ms(self, num_bytes: int) -> float:
        """To send so many bytes."""
        return self.latency_ms + num_bytes / self.bytes_per_ms


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        tokens_per_s: drawn by all rows together.
        step_ms: from one token of a row to its next, on average.
        idle: share of the stages' time.
    """

    tokens_per_s: float
    step_ms: float
    idle: float


def simulate(
    num_stages: int,
    num_groups: int,
    rows: int,
    chunk: Callable[[], int],
    seconds: float,
    model: Model | None = None,
    link: Link | None = None,
) -> Outcome:
    """Run decodes, and beside them what `chunk` gives of prompts for each step, for so long.

    Args:
        num_stages: nodes.
        num_groups: steps under way at most.
        rows: that decode in each group.
        chunk: tokens to prefill in the next step.
    """
    model, link = model or Model(), link or Link()
    free_at = [0.0] * num_stages
    ready_at = [0.0] * num_groups
    busy = drawn = num_steps = 0.0
    end_ms = 1e3 * seconds
    while min(ready_at) < end_ms:
        group = min(range(num_groups), key=ready_at.__getitem__)
        num_new = chunk()
        num_tokens = rows + num_new
        now, stage_ms = ready_at[group], model.stage_ms(num_tokens, num_stages)
        for stage in range(num_stages):
            now = max(now, free_at[stage]) + stage_ms
            free_at[stage] = now
            sends_hidden = stage < num_stages - 1
            if num_stages > 1:
                now += link.ms(num_tokens * model.hidden_bytes if sends_hidden else 4 * rows)
        ready_at[group] = now
        busy += stage_ms * num_stages
        drawn += rows
        num_steps += 1
    total_ms = max(free_at)
    return Outcome(
        1e3 * drawn / total_ms, num_groups * total_ms / num_steps,
        max(0.0, 1 - busy / (total_ms * num_stages)),
    )  # fmt: skip


def loads(tokens_a_step: int, seed: int = 0) -> dict[str, Callable[[], int]]:
    """Prompts beside the decodes, by name: none; four steps' worth in every fourth, at random; the same in every step.

    Args:
        tokens_a_step: of prompts, on average.
    """
    draws = random.Random(seed)
    return {
        "decodes": lambda: 0,
        "prompts in some steps": lambda: draws.choice((0, 0, 0, 4 * tokens_a_step)),
        "prompts in every step": lambda: tokens_a_step,
    }


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rows", type=int, default=256, help="that decode in each group")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="beside them in a step, on average")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    for num_nodes in options.nodes:
        for num_groups in (1, num_nodes, num_nodes + 1, 2 * num_nodes):
            for name, chunk in loads(options.prompt_tokens).items():
                made = simulate(num_nodes, num_groups, options.rows, chunk, options.seconds)
                alone = simulate(1, 1, options.rows, loads(options.prompt_tokens)[name], options.seconds)
                line = {
                    "nodes": num_nodes, "groups": num_groups, "load": name, "idle": round(made.idle, 3),
                    "of one node": round(made.tokens_per_s / alone.tokens_per_s / num_nodes, 3),
                    "tokens_per_s": round(made.tokens_per_s), "step_ms": round(made.step_ms, 1),
                }  # fmt: skip
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
