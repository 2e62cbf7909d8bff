"""The checker of the documents' English finds each fault in its line, and reads no code."""

from pathlib import Path

import pytest

from scripts.prose import MAX_WORDS, blocks_of_markdown, blocks_of_python, check, faults, faults_of_sentences, main

LONG = " ".join(f"Word{i}" for i in range(MAX_WORDS))


def found(text: str) -> list[tuple[int, str]]:
    return [
        (fault.line, fault.advice)
        for block in blocks_of_markdown(text)
        for fault in (*faults(block), *faults_of_sentences(block))
    ]


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Please set a key.", "leave it out"),
        ("This is very fast.", "leave it out, or give the figure"),
        ("A model, e.g. Llama.", "for example"),
        ("The prompt is computed anew.", "again"),
        ("Its streams go on elsewhere.", "continue"),
        ("Wait, else it fails.", "otherwise"),
        ("Tokenising takes a while.", "American spelling"),
        ("The behaviour is the same.", "American spelling"),
        ("We measured it.", "name who does it"),
        ("It is is there.", "stands twice"),
        ("It is known that it works.", "say who"),
        ("A router, which has a key, which is secret, listens.", "chain of 'which'"),
        (f"{LONG} more.", f"a sentence of {MAX_WORDS + 1} words"),
    ],
)
def test_a_fault_is_found(text: str, advice: str):
    ((line, given),) = found(f"# Heading\n\nA first sentence.\n{text}\n")
    assert line == 4
    assert advice in given


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG}.",
        "Set `please` and `our_key` in `<very>`.",
        "See [the page](https://example.com/please/we/our).",
        "```bash\nplease very our\n```",
        "A list:\n\n    please very our",
        "He said that that works.",
        "If it fails, or else if it hangs, restart it.",
        "The US has a keyboard; I/O is fast.",
        "An `organisation` is organized.",
    ],
)
def test_what_is_right_or_code_is_left_alone(text: str):
    assert found(f"{text}\n") == []


def test_items_cells_and_headings_are_sentences_of_their_own():
    half = " ".join(LONG.split()[: MAX_WORDS // 2 + 1])
    text = f"## {half}\n{half}\n\n- {half}\n- {half}\n\n| {half} | {half} |\n|---|---|\n"
    assert found(text) == []
    assert [line for line, _ in found(f"| a | our |\n|---|---|\n| {LONG} {half} | b |\n")] == [1, 3]


def test_only_what_a_module_says_to_people_is_read():
    source = '''"""Our docstring, please."""

import logging

logger = logging.getLogger("our")
VALUE = "our_value is"


def run(name: str) -> None:
    logger.warning("starts anew: %s", name)
    raise ValueError(f"{name} is over; run `our` tool")
'''
    given = {(fault.line, fault.advice) for block in blocks_of_python(source) for fault in faults(block)}
    assert given == {(10, "'anew': again"), (11, "'is over': has ended")}


def test_decisions_may_list_figures_in_long_sentences(tmp_path: Path):
    (tmp_path / "decisions").mkdir()
    for folder, num_faults in ((tmp_path / "decisions", 1), (tmp_path, 2)):
        (folder / "page.md").write_text(f"{LONG} and our figures.\n")
        assert len(check(folder / "page.md")) == num_faults


def test_faults_are_printed_and_fail_the_command(tmp_path: Path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("Fine.\n\nPlease wait.\n")
    assert len(check(page)) == 1
    monkeypatch.setattr("sys.argv", ["prose", str(page)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().out == f"{page}:3: 'Please': leave it out\n"
    page.write_text("Fine.\n")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
