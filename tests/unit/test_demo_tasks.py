"""The demo's tasks: answers checked by reading the prompt as a person would, and the split into two sides."""

import re
from itertools import pairwise
from random import Random

import pytest

from demo.conversations import training_rows
from demo.tasks import TASKS, Case, held_out_cases, is_correct, is_held_out, training_case
from demo.tokenizer import build_tokenizer


def expected_sum(prompt: str) -> str:
    a, b = map(int, re.findall(r"\d+", prompt))
    return str(a + b)


def expected_difference(prompt: str) -> str:
    first, second = map(int, re.findall(r"\d+", prompt))
    return str(second - first if " from " in prompt else first - second)


def expected_next(prompt: str, num_terms: int) -> str:
    terms = [int(term) for term in re.search(r"\d+(, \d+)+", prompt)[0].split(", ")]
    step = terms[1] - terms[0]
    assert all(b - a == step for a, b in pairwise(terms))
    return ", ".join(str(terms[-1] + step * i) for i in range(1, num_terms + 1))


def expected_count(prompt: str) -> str:
    start, last = map(int, re.search(r"(\d+) (?:up )?to (\d+)", prompt).groups())
    step = int(found[1]) if (found := re.search(r"(?:by|steps of) (\d+)", prompt)) else 1
    numbers, number = [], start
    while number <= last if start <= last else number >= last:
        numbers.append(str(number))
        number += step if start <= last else -step
    return " ".join(numbers)


def expected_table(prompt: str) -> str:
    factor, num_rows = map(int, re.findall(r"\d+", prompt))
    return "\n".join(f"{factor} x {i} = {factor * i}" for i in range(1, num_rows + 1))


ORACLES = {
    "add_99": expected_sum,
    "add_999": expected_sum,
    "subtract_99": expected_difference,
    "subtract_999": expected_difference,
    "next_term": lambda prompt: expected_next(prompt, 1),
    "next_terms": lambda prompt: expected_next(prompt, 3),
    "count": expected_count,
    "count_by": expected_count,
    "count_down": expected_count,
    "table": expected_table,
}


def create_cases(task: str, n: int = 300) -> list[Case]:
    """Cases of both sides of the split."""
    rng = Random(task)
    return held_out_cases(task, n) + [training_case(TASKS[task], rng) for _ in range(n)]


@pytest.mark.parametrize("task", ORACLES)
def test_number_tasks_are_answered_right(task: str) -> None:
    """Every answer equals the one worked out from the prompt alone."""
    for case in create_cases(task):
        assert case.answer == ORACLES[task](case.prompt), case


def test_reversed_words_are_in_the_prompt() -> None:
    """Read from its end, the answer is the word that was asked about."""
    for case in create_cases("reverse"):
        assert case.answer[::-1] in re.findall(r"\w+", case.prompt), case


def test_sorted_letters_are_those_of_the_word() -> None:
    """The answer is in order and has the letters of a word in the prompt."""
    for case in create_cases("sort"):
        assert list(case.answer) == sorted(case.answer)
        assert any(sorted(word.lower()) == list(case.answer) for word in re.findall(r"\w+", case.prompt)), case


@pytest.mark.parametrize("task", ["count_letter", "word_length"])
def test_letters_are_counted_right(task: str) -> None:
    """The count is that of the word and letter which the prompt names."""
    rng = Random(0)
    for _ in range(300):
        problem = TASKS[task].problem(rng, held_out=False)
        word, letter = problem.fields["w"], problem.fields.get("l")
        counted = [c for c in word.lower() if letter is None or c == letter]
        assert problem.answer == str(len(counted))
        assert word in TASKS[task].phrase(problem, rng).prompt


def test_limits_of_the_numbers() -> None:
    """Two-digit tasks stay below 100; the others reach 999 and go below zero."""
    assert all(int(n) <= 99 for case in create_cases("add_99") for n in re.findall(r"\d+", case.prompt))
    differences = [int(case.answer) for case in create_cases("subtract_999")]
    assert min(differences) < -500
    assert max(differences) > 500


@pytest.mark.parametrize("task", TASKS)
def test_held_out_cases_are_held_out_and_repeatable(task: str) -> None:
    """The same seed gives the same cases, another seed others, and no training prompt is among them."""
    cases = held_out_cases(task, 100, seed=1)
    assert cases == held_out_cases(task, 100, seed=1)
    assert cases != held_out_cases(task, 100, seed=2)
    assert len(cases) == 100
    rng = Random(1)
    trained = {training_case(TASKS[task], rng).prompt for _ in range(3000)}
    assert trained.isdisjoint(case.prompt for case in cases)


def test_training_rows_hold_no_held_out_problem() -> None:
    """In the very rows the model trains on, in chats and plain text, no held-out sum or word is asked about."""
    text = build_tokenizer().decode(training_rows("a seed", 200, 2048).flatten().tolist(), skip_special_tokens=False)
    sums = [tuple(map(int, pair)) for pair in re.findall(r"(?<!\d)(\d+) ?\+ ?(\d+)(?= ?[=?.<])", text)]
    words = re.findall(r"[Ss]pell '(\w+)' backwards|[Ss]ort the letters (?:of|in) '(\w+)'", text)
    assert len(sums) > 200
    assert len(words) > 20
    assert not [pair for pair in sums if is_held_out(f"add {min(pair)} {max(pair)}")]
    assert not [word for pair in words for word in pair if word and is_held_out(f"word {word.lower()}")]


def test_training_rows_depend_on_the_seed_alone() -> None:
    """The same seed makes the same rows, each starting a conversation."""
    rows = training_rows("7", 3, 300)
    assert (rows == training_rows("7", 3, 300)).all()
    assert (rows != training_rows("8", 3, 300)).any()
    assert build_tokenizer().decode(rows[1].tolist(), skip_special_tokens=False).startswith("<|begin|>")


def test_grading_wants_the_exact_answer() -> None:
    """White space around the answer is forgiven, anything else is not."""
    case = Case("What is 17 + 25?", "42")
    assert is_correct(case, " 42\n")
    assert not is_correct(case, "42.")
    assert not is_correct(case, "")
