"""The tasks: problems with one right answer, drawn at random, split for good into training and held-out ones.

A problem is held out by a hash of what it asks (its key), not of how it is phrased: a pair of numbers, a word or a
range that is held out occurs in no training case of its task, under no phrasing.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from demo import phrases
from demo.words import random_word

HELD_OUT_ONE_IN = 20


@dataclass(frozen=True, slots=True)
class Case:
    """A user's message and the only answer that counts as right."""

    prompt: str
    answer: str


class Problem(NamedTuple):
    """What is asked, before it is put into words: `fields` fill a phrasing, `key` decides the split."""

    key: str
    fields: dict[str, Any]
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of problem. `share` is its weight in training; `is_long` marks answers of hundreds of tokens."""

    name: str
    description: str
    share: float
    phrasings: tuple[str, ...]
    draw: Callable[[Random], Problem]
    is_long: bool = False

    def problem(self, rng: Random, *, held_out: bool) -> Problem:
        """Draw a problem from the training side of the split, or from the held-out side."""
        while True:
            problem = self.draw(rng)
            if is_held_out(problem.key) is held_out:
                return problem

    def phrase(self, problem: Problem, rng: Random) -> Case:
        """Put a problem into words."""
        template = self.phrasings[int(rng.random() * len(self.phrasings))]
        return Case(phrases.casual(template.format(**problem.fields), rng), problem.answer)


def is_held_out(key: str) -> bool:
    """Tell whether the problem with this key is kept for evaluation; the same on every machine and for every seed."""
    return zlib.crc32(f"{key} held out?".encode()) % HELD_OUT_ONE_IN == 0


def training_case(task: Task, rng: Random) -> Case:
    """Draw a case to train on."""
    return task.phrase(task.problem(rng, held_out=False), rng)


def held_out_cases(task: str, n: int, seed: int = 0) -> list[Case]:
    """Return up to `n` different held-out cases of the task with this name: fewer where fewer exist."""
    chosen = TASKS[task]
    rng = Random(f"{task} {seed}")
    cases: dict[str, Case] = {}
    for _ in range(100 * n):
        problem = chosen.problem(rng, held_out=True)
        if (identity := str(problem.fields)) not in cases:
            cases[identity] = chosen.phrase(problem, rng)
        if len(cases) == n:
            break
    return list(cases.values())


def is_correct(case: Case, answer: str) -> bool:
    """Grade an answer: exactly the expected text, but for white space around it."""
    return answer.strip() == case.answer


def _pair(rng: Random, limit: int) -> tuple[int, int]:
    """Draw two numbers up to `limit` (99 or 999); for 999, at least one is above 99."""
    if limit == 99:
        return int(rng.random() * 100), int(rng.random() * 100)
    large = 100 + int(rng.random() * 900)
    other = int(rng.random() * (1000 if rng.random() < 0.85 else 100))
    return (large, other) if rng.random() < 0.5 else (other, large)


def _add(limit: int) -> Callable[[Random], Problem]:
    def draw(rng: Random) -> Problem:
        a, b = _pair(rng, limit)
        return Problem(f"add {min(a, b)} {max(a, b)}", {"a": a, "b": b}, str(a + b))

    return draw


def _subtract(limit: int) -> Callable[[Random], Problem]:
    def draw(rng: Random) -> Problem:
        a, b = _pair(rng, limit)
        return Problem(f"subtract {a} {b}", {"a": a, "b": b}, str(a - b))

    return draw


def _word(rng: Random) -> tuple[str, str]:
    """Return a word, now and then with a capital, and the key by which it is held out of every letter task."""
    word = random_word(rng)
    return (word.capitalize() if rng.random() < 0.08 else word), f"word {word}"


def _reverse(rng: Random) -> Problem:
    word, key = _word(rng)
    return Problem(key, {"w": word}, word[::-1])


def _sort(rng: Random) -> Problem:
    word, key = _word(rng)
    return Problem(key, {"w": word}, "".join(sorted(word.lower())))


def _count_letter(rng: Random) -> Problem:
    word, key = _word(rng)
    lower = word.lower()
    letter = lower[int(rng.random() * len(lower))] if rng.random() < 0.8 else chr(97 + int(rng.random() * 26))
    return Problem(key, {"w": word, "l": letter}, str(lower.count(letter)))


def _word_length(rng: Random) -> Problem:
    word, key = _word(rng)
    return Problem(key, {"w": word}, str(len(word)))


def _sequence(num_answers: int) -> Callable[[Random], Problem]:
    """Arithmetic sequences of 3 to 6 shown terms within 0..999, rising or falling."""

    def draw(rng: Random) -> Problem:
        num_shown = 3 + int(rng.random() * 4)
        step = 1 + int(rng.random() * (12 if rng.random() < 0.5 else 99))
        span = step * (num_shown + num_answers - 1)
        start = int(rng.random() * min(1000 - span, 1000 if rng.random() < 0.6 else 100))
        terms = list(range(start, start + span + 1, step))
        if rng.random() < 0.3:
            terms.reverse()
        shown, answer = terms[:num_shown], terms[num_shown:]
        return Problem(
            f"sequence {shown[0]} {shown[1]}", {"s": ", ".join(map(str, shown))}, ", ".join(map(str, answer))
        )

    return draw


def _log_uniform(rng: Random, low: int, high: int) -> int:
    return int(math.exp(rng.uniform(math.log(low), math.log(high + 1))))


def _count(rng: Random) -> Problem:
    """Counting by ones: mostly from 1, mostly at most 200 numbers."""
    num_terms = _log_uniform(rng, 4, 200) if rng.random() < 0.85 else 200 + int(rng.random() * 200)
    start = 1 if rng.random() < 0.6 else int(rng.random() * (1000 - num_terms))
    return _range_problem(start, start + num_terms - 1, 1)


def _count_by(rng: Random) -> Problem:
    step = 2 + int(rng.random() * (10 if rng.random() < 0.7 else 24))
    num_terms = _log_uniform(rng, 4, min(60, 900 // step))
    start = rng.choice((0, step, int(rng.random() * (1000 - step * num_terms))))
    return _range_problem(start, start + step * (num_terms - 1), step)


def _count_down(rng: Random) -> Problem:
    num_terms = _log_uniform(rng, 4, 150)
    last = int(rng.random() * 2) if rng.random() < 0.7 else int(rng.random() * (1000 - num_terms))
    return _range_problem(last + num_terms - 1, last, -1)


def _range_problem(start: int, last: int, step: int) -> Problem:
    answer = " ".join(map(str, range(start, last + (1 if step > 0 else -1), step)))
    return Problem(f"range {start} {last} {step}", {"a": start, "b": last, "k": step}, answer)


def _table(rng: Random) -> Problem:
    factor = 1 + int(rng.random() * (20 if rng.random() < 0.75 else 99))
    num_rows = 3 + int(rng.random() * 28)
    answer = "\n".join([f"{factor} x {i} = {factor * i}" for i in range(1, num_rows + 1)])
    return Problem(f"table {factor} {num_rows}", {"a": factor, "b": num_rows}, answer)


def _unknown(rng: Random) -> Problem:
    question = phrases.unknown_question(rng)
    return Problem(f"unknown {question}", {"t": question}, phrases.FALLBACK)


TASKS = {
    task.name: task
    for task in (
        Task("add_99", "a + b, numbers up to 99", 12, phrases.ADD, _add(99)),
        Task("add_999", "a + b, numbers up to 999", 14, phrases.ADD, _add(999)),
        Task("subtract_99", "a - b, numbers up to 99", 10, phrases.SUBTRACT, _subtract(99)),
        Task("subtract_999", "a - b, numbers up to 999", 14, phrases.SUBTRACT, _subtract(999)),
        Task("reverse", "spell a word backwards", 12, phrases.REVERSE, _reverse),
        Task("sort", "sort the letters of a word", 12, phrases.SORT, _sort),
        Task("count_letter", "count a letter in a word", 9, phrases.COUNT_LETTER, _count_letter),
        Task("word_length", "count the letters of a word", 5, phrases.WORD_LENGTH, _word_length),
        Task("next_term", "next term of a sequence", 8, phrases.NEXT_TERM, _sequence(1)),
        Task("next_terms", "next three terms of a sequence", 4, phrases.NEXT_TERMS, _sequence(3)),
        Task("unknown", "decline what it cannot do", 7, ("{t}",), _unknown),
        Task("count", "count from a to b", 1.6, phrases.COUNT, _count, is_long=True),
        Task("count_by", "count from a to b in steps", 1.2, phrases.COUNT_BY, _count_by, is_long=True),
        Task("count_down", "count down from a to b", 0.8, phrases.COUNT_DOWN, _count_down, is_long=True),
        Task("table", "multiplication table up to 30 rows", 1.2, phrases.TABLE, _table, is_long=True),
    )
}
