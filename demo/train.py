"""Train the demo model from scratch: `python -m demo.train --out configs/demo`.

The budget is wall-clock time: the learning rate falls linearly to zero over it. The first part trains on short rows,
where most is learned for the least attention, and the rest on rows as long as the context.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from demo.model import CONTEXT_LENGTH, build_model, save_checkpoint
from demo.stream import BatchStream
from demo.tokenizer import ASSISTANT, BEGIN, END, SPECIAL_IDS, SYSTEM, USER

SHORT_LENGTH = 512
SHORT_SHARE = 0.6  # of the time
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 200
REPORT_EVERY_S = 5.0

Loss = Callable[[Tensor], Tensor]


class Progress(NamedTuple):
    """One line of the training log."""

    step: int
    elapsed_s: float
    loss: float
    tokens_per_s: float
    learning_rate: float

    def __str__(self) -> str:
        return (
            f"step {self.step:6d}   {self.elapsed_s:6.1f} s   loss {self.loss:.4f}   "
            f"{self.tokens_per_s / 1e3:8.1f}k tokens/s   learning rate {self.learning_rate:.2e}"
        )


def answer_mask(inputs: Tensor) -> Tensor:
    """Tell which positions of `inputs` (rows, length) are trained to predict their successor.

    Those are the assistant's turns, from `<|assistant|>` up to the token before its end, so that the end of the turn
    is learned too, and plain text, which follows `<|begin|>` directly.
    """
    is_role = torch.zeros_like(inputs, dtype=torch.bool)
    for token in (BEGIN, SYSTEM, USER, ASSISTANT):
        is_role |= inputs == SPECIAL_IDS[token]
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    last_role = inputs.gather(1, torch.where(is_role, positions, 0).cummax(dim=1).values)
    speaks = (last_role == SPECIAL_IDS[ASSISTANT]) | (last_role == SPECIAL_IDS[BEGIN])
    return speaks & (inputs != SPECIAL_IDS[END])


def make_loss(model: LlamaForCausalLM, device: torch.device, *, compiled: bool) -> Loss:
    """Return the mean cross-entropy over the answers of a batch `(rows, length + 1)`, in bfloat16 on a GPU."""

    def head_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, model.lm_head.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)

    if compiled:
        head_loss = torch.compile(head_loss, dynamic=False)
        for layer in model.model.layers:  # one by one: they share the compiled code, and causal masks stay implicit
            layer.compile(dynamic=False)

    def loss(rows: Tensor) -> Tensor:
        inputs, targets = rows[:, :-1], rows[:, 1:]
        targets = targets.masked_fill(~answer_mask(inputs), -100)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            return head_loss(hidden, targets)

    return loss


def make_optimizer(model: LlamaForCausalLM, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=device.type == "cuda")


def learning_rate(step: int, time_used: float) -> float:
    """Return the rate at this step with this fraction of the time used: a short warm-up, then linear to zero."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1.0 - time_used)


def train(
    model: LlamaForCausalLM,
    loss_of: Loss,
    batch_of: Callable[[float], Tensor],
    budget_s: float,
    report: Callable[[Progress], None],
) -> None:
    """Train in place for `budget_s` seconds. `batch_of` gets the fraction of the time used."""
    optimizer = make_optimizer(model, model.device)
    start = last_report = time.monotonic()
    step = num_steps = num_tokens = 0
    total = torch.zeros((), device=model.device)
    while (elapsed := time.monotonic() - start) < budget_s:
        rate = learning_rate(step, elapsed / budget_s)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = batch_of(elapsed / budget_s)
        loss = loss_of(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, num_steps, num_tokens = step + 1, num_steps + 1, num_tokens + rows.numel()
        total += loss.detach()
        if (now := time.monotonic()) - last_report > REPORT_EVERY_S:
            report(Progress(step, now - start, total.item() / num_steps, num_tokens / (now - last_report), rate))
            last_report, num_steps, num_tokens = now, 0, 0
            total.zero_()


def to_device(batches: Iterator[np.ndarray], device: torch.device) -> Iterator[Tensor]:
    """Turn arrays into int64 tensors on the device."""
    for batch in batches:
        rows = torch.from_numpy(batch)
        if device.type == "cuda":
            rows = rows.pin_memory()
        yield rows.to(device, non_blocking=True).long()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.train", description="Train the demo model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=7.2, help="time to train, without compiling (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, help="tokens a step (65536 on a GPU, 4096 on a CPU)")
    parser.add_argument("--workers", type=int, help="processes that make data, for each row length")
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    return parser.parse_args()


def main() -> None:
    """Make the data streams, warm up, train, and save."""
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    batch_tokens = arguments.batch_tokens or (65536 if on_gpu else 4096)
    num_workers = arguments.workers or max(1, min(6, (os.cpu_count() or 2) // 2 - 1))
    streams = [
        BatchStream(arguments.seed, max(1, batch_tokens // length), length + 1, num_workers)
        for length in (SHORT_LENGTH, CONTEXT_LENGTH)
    ]
    short, long = (to_device(iter(stream), device) for stream in streams)

    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model().to(device).train()
    print(f"{model.num_parameters():,} parameters on {device}, {batch_tokens} tokens a step", flush=True)
    loss_of = make_loss(model, device, compiled=on_gpu and not arguments.no_compile)
    warmup_start = time.monotonic()
    for batches in (short, long):  # compiles for both lengths before the clock starts
        loss_of(next(batches)).backward()
    model.zero_grad(set_to_none=True)
    print(f"warm-up took {time.monotonic() - warmup_start:.0f} s", flush=True)

    train(
        model,
        loss_of,
        lambda time_used: next(short if time_used < SHORT_SHARE else long),
        60 * arguments.minutes,
        lambda progress: print(progress, flush=True),
    )
    for stream in streams:
        stream.close()
    save_checkpoint(model, arguments.out)
    print(f"saved to {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
