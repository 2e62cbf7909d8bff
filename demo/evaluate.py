"""Accuracy by task on held-out cases, greedily and in float32: `python -m demo.evaluate configs/demo`."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.tasks import TASKS, Case, held_out_cases, is_correct, training_case

Message = dict[str, str]

_MAX_BATCH = 256
_MAX_BATCH_TOKENS = 128 * 1024


def chat_before(num_tokens: int, rng: Random) -> list[Message]:
    """Return earlier turns of a chat, rightly answered, of about `num_tokens` tokens; none for 0."""
    messages: list[Message] = []
    length = 0
    tasks = list(TASKS.values())
    while length < num_tokens:
        case = training_case(rng.choices(tasks, [task.share for task in tasks])[0], rng)
        if length + len(case.prompt) + len(case.answer) > num_tokens + 100:
            continue
        messages += [{"role": "user", "content": case.prompt}, {"role": "assistant", "content": case.answer}]
        length += len(case.prompt) + len(case.answer) + 4
    return messages


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]], n: int) -> list[str]:
    """Answer the chats as one batch, greedily, with at most `n` tokens each."""
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = inputs.to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=n, do_sample=False)
    return tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], history_tokens: int = 0
) -> tuple[float, list[tuple[Case, str]]]:
    """Return the fraction of cases answered exactly right, and the wrong ones with their answers."""
    rng = Random(f"history {history_tokens}")
    wrong: list[tuple[Case, str]] = []
    rest = sorted(cases, key=lambda case: len(case.answer))
    while rest:
        longest = history_tokens + 200 + len(rest[min(len(rest), _MAX_BATCH) - 1].answer)
        size = max(1, min(_MAX_BATCH, _MAX_BATCH_TOKENS // longest))
        batch, rest = rest[:size], rest[size:]
        chats = [[*chat_before(history_tokens, rng), {"role": "user", "content": case.prompt}] for case in batch]
        answers = answer(model, tokenizer, chats, len(batch[-1].answer) + 8)
        wrong += [(case, text) for case, text in zip(batch, answers, strict=True) if not is_correct(case, text)]
    return 1 - len(wrong) / len(cases), wrong


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description="Accuracy on held-out cases by task.")
    parser.add_argument("checkpoint", type=Path, help="folder in transformers' layout")
    parser.add_argument("--cases", type=int, default=500, help="cases a task; a fifth for long answers (%(default)s)")
    parser.add_argument("--history", type=int, default=0, help="tokens of earlier chat before each case (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--wrong", type=int, default=0, help="show this many wrong answers a task")
    return parser.parse_args()


def main() -> None:
    """Print a markdown table, a row a task."""
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    model.to(arguments.device).eval()
    start = time.monotonic()
    print("| task | example | held-out cases | right |\n| --- | --- | ---: | ---: |", flush=True)
    mistakes: list[str] = []
    for task in TASKS.values():
        num_cases = max(1, arguments.cases // 5) if task.is_long else arguments.cases
        cases = held_out_cases(task.name, num_cases, arguments.seed)
        right, wrong = accuracy(model, tokenizer, cases, arguments.history)
        print(f"| {task.description} | {cases[0].prompt} | {len(cases)} | {100 * right:.1f} % |", flush=True)
        mistakes += [f"{task.name}: {case} answered {text!r}" for case, text in wrong[: arguments.wrong]]
    print(f"\n{time.monotonic() - start:.0f} s on {arguments.device}", *mistakes, sep="\n")


if __name__ == "__main__":
    main()
