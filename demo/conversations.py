"""Training rows: conversations of solved tasks, each starting with `<|begin|>`, packed to a fixed length."""

from itertools import accumulate
from random import Random

import numpy as np

from demo import phrases
from demo.tasks import TASKS, training_case
from demo.tokenizer import ASSISTANT, BEGIN, END, SPECIAL_IDS, SYSTEM, USER

# Bytes that never occur in UTF-8 stand for special tokens while a row is text: it becomes ids in one look-up.
_STAND_INS = {token: bytes([0xF8 + i]) for i, token in enumerate((BEGIN, END, SYSTEM, USER, ASSISTANT))}
_BEGIN, _END, _SYSTEM, _USER, _ASSISTANT = _STAND_INS.values()
_ID_OF_BYTE = np.arange(256, dtype=np.int16)
for _token, _stand_in in _STAND_INS.items():
    _ID_OF_BYTE[_stand_in[0]] = SPECIAL_IDS[_token]

_SMALL_TALK_SHARE = 4.0
_TASKS = tuple(TASKS.values())
_SHARES = tuple(accumulate((*(task.share for task in _TASKS), _SMALL_TALK_SHARE)))
_SMALL_TALK = tuple(phrases.SMALL_TALK.items())


def training_rows(seed: str, num_rows: int, length: int) -> np.ndarray:
    """Return ids `(num_rows, length)`, int16, the same for the same seed. The last conversation of a row is cut."""
    rng = Random(seed)
    rows = b"".join([_row(rng, length) for _ in range(num_rows)])
    return _ID_OF_BYTE[np.frombuffer(rows, dtype=np.uint8)].reshape(num_rows, length)


def _row(rng: Random, length: int) -> bytes:
    parts: list[bytes] = []
    missing = length
    while missing > 0:
        parts.append(_plain_sums(rng) if rng.random() < 0.02 else _conversation(rng))
        missing -= len(parts[-1])
    return b"".join(parts)[:length]


def _conversation(rng: Random) -> bytes:
    """Return one chat of 1 to 40 turns, with a system message three times in ten."""
    kind = rng.random()
    num_turns = 1 if kind < 0.45 else 2 + int(rng.random() * (4 if kind < 0.85 else 39))
    parts = [_BEGIN]
    if rng.random() < 0.3:
        parts += (_SYSTEM, _system_message(rng).encode(), _END)
    for _ in range(num_turns):
        prompt, answer = _turn(rng)
        parts += (_USER, prompt.encode(), _END, _ASSISTANT, answer.encode(), _END)
    return b"".join(parts)


def _turn(rng: Random) -> tuple[str, str]:
    """Return a user's message and the right answer, its task drawn by share."""
    task = rng.choices(_TASKS_AND_TALK, cum_weights=_SHARES)[0]
    if task is None:
        answer, prompts = rng.choice(_SMALL_TALK)
        return _careless(rng.choice(prompts), rng), answer
    case = training_case(task, rng)
    return case.prompt, case.answer


_TASKS_AND_TALK = (*_TASKS, None)


def _careless(prompt: str, rng: Random) -> str:
    """Return small talk as typed: sometimes all in lower case, sometimes without its last mark."""
    prompt = prompt.lower() if rng.random() < 0.3 else prompt
    return prompt.rstrip(".!?") if rng.random() < 0.2 else prompt


def _system_message(rng: Random) -> str:
    return rng.choice(phrases.SYSTEM_MESSAGES) if rng.random() < 0.8 else phrases.unknown_question(rng)


def _plain_sums(rng: Random) -> bytes:
    """Return lines such as "17 + 25 = 42", without roles, so that plain completion has a meaning too."""
    lines = []
    for _ in range(1 + int(rng.random() * 8)):
        name = ("add_99", "add_999", "subtract_99", "subtract_999")[int(rng.random() * 4)]
        problem = TASKS[name].problem(rng, held_out=False)
        sign = "+" if name.startswith("add") else "-"
        lines.append(f"{problem.fields['a']} {sign} {problem.fields['b']} = {problem.answer}")
    return _BEGIN + "\n".join(lines).encode() + _END
