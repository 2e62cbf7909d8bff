"""Reasoning and tool calls in a model's text, cut anywhere."""

import json

import pytest
from hypothesis import given, strategies as st

from deployments.chat.output import (
    OutputEvent,
    OutputParser,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)
from deployments.chat.parsers import AnswerForm, make_parser
from deployments.model_config import ReasoningParserName, ToolParserName


def parse(parser: OutputParser, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Content, reasoning, and (name, arguments) of each call; what an event says must fit those before it."""
    events: list[OutputEvent] = []
    for piece in pieces:
        events += parser.push(piece)
    events += parser.finish()
    content, reasoning, calls, ids = "", "", [], set()
    for event in events:
        match event:
            case TextDelta(text):
                content += text
            case ReasoningDelta(text):
                assert not content
                assert not calls
                reasoning += text
            case ToolCallStart(index, call_id, name):
                assert index == len(calls)
                calls.append((name, ""))
                ids.add(call_id)
            case ToolCallArguments(index, text):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    assert len(ids) == len(calls)
    return content, reasoning, calls


CALL = '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}\\"{"}]}}'
ARGUMENTS = '{"a": 1, "b": [2, {"c": "}\\"{"}]}'
LLAMA_CALL = CALL.replace("arguments", "parameters")

CASES = {
    "text": ("hermes", "Just 3 < 4 and <tool, no call.", "Just 3 < 4 and <tool, no call.", []),
    "one call": ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [("add", ARGUMENTS)]),
    "text and two calls": (
        "hermes",
        f"Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n",
        "Let me see.\n",
        [("add", ARGUMENTS)] * 2,
    ),
    "text behind": ("hermes", f"<tool_call>{CALL}</tool_call>\nDone.", "Done.", [("add", ARGUMENTS)]),
    "arguments first": (
        "hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')],
    ),
    "no JSON": ("hermes", "<tool_call>hello</tool_call> world", "<tool_call>hello</tool_call> world", []),
    "no call": ("hermes", '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    "closing tag left out": ("hermes", f"<tool_call>{CALL}", "", [("add", ARGUMENTS)]),
    "cut in the arguments": ("hermes", "<tool_call>" + CALL[:40], "", [("add", ARGUMENTS[:11])]),
    "cut in the name": ("hermes", '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    "the tag in an argument": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>',
        "",
        [("f", '{"x": "</tool_call>"}')],
    ),
    "llama text": ("llama3", "The answer is {42}.", "The answer is {42}.", []),
    "llama call": ("llama3", LLAMA_CALL, "", [("add", ARGUMENTS)]),
    "llama calls": ("llama3", f"{LLAMA_CALL}; {LLAMA_CALL}", "", [("add", ARGUMENTS)] * 2),
    "llama tag": ("llama3", f"<|python_tag|>{LLAMA_CALL}", "", [("add", ARGUMENTS)]),
    "llama with a type": (
        "llama3", '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")],
    ),
    "list of calls": ("llama3", f"[{CALL}, {CALL}]", "", [("add", ARGUMENTS)] * 2),
    "list": ("llama3", "[1, 2, 3]", "[1, 2, 3]", []),
    "JSON that is no call": ("llama3", '{"name": "Bob", "age": 3} is he', '{"name": "Bob", "age": 3} is he', []),
    "JSON cut": ("llama3", '{"name": "Bob", "a', '{"name": "Bob", "a', []),
    "white space": ("llama3", " \n", " \n", []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_whole_and_letter_by_letter(name: str):
    tool_format, text, content, calls = CASES[name]
    for pieces in ([text], list(text)):
        parser = make_parser(AnswerForm(ToolParserName(tool_format)))
        assert parse(parser, pieces) == (content, "", calls)


@given(st.data())
def test_any_cut_gives_the_same(data: st.DataObject):
    tool_format, text, content, calls = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parser = make_parser(AnswerForm(ToolParserName(tool_format)))
    assert parse(parser, pieces) == (content, "", calls)


@given(st.text(alphabet='<>/_tolcal{}"[]:, \nname', max_size=80), st.sampled_from(["hermes", "llama3"]))
def test_what_is_no_call_is_not_lost(text: str, tool_format: str):
    parser = make_parser(AnswerForm(ToolParserName(tool_format)))
    content, _, calls = parse(parser, list(text))
    if not calls:
        assert content.strip() == text.strip()


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=8) | st.integers() | st.lists(st.none()), max_size=4))
def test_arguments_come_back_as_they_were(arguments: dict):
    written = json.dumps(arguments)
    call = json.dumps({"name": "f", "arguments": arguments})
    parser = make_parser(AnswerForm(ToolParserName.HERMES))
    assert parse(parser, list(f"<tool_call>{call}</tool_call>")) == ("", "", [("f", written)])


THINKING = {
    "thoughts, then an answer": (False, "<think>\nHm.\n</think>\n\nYes.", "Yes.", "Hm.\n"),
    "opened by the prompt": (True, "Hm.</think>\nYes.", "Yes.", "Hm."),
    "none": (False, "Yes <think> no.", "Yes <think> no.", ""),
    "not closed": (False, "<think>Hm. </thin", "", "Hm. </thin"),
    "opened, not closed": (True, "Hm", "", "Hm"),
    "almost a tag": (False, "<thinking>", "<thinking>", ""),
    "half a tag": (False, "<thi", "<thi", ""),
    "empty thoughts": (False, "<think>\n\n</think>\n\nYes.", "Yes.", ""),
}


@pytest.mark.parametrize("name", THINKING)
def test_reasoning_is_split_off(name: str):
    is_open, text, content, reasoning = THINKING[name]
    for pieces in ([text], list(text)):
        parser = make_parser(AnswerForm(reasoning_parser=ReasoningParserName.THINK, is_reasoning=is_open))
        assert parse(parser, pieces) == (content, reasoning, [])


def test_reasoning_then_a_call():
    parser = make_parser(AnswerForm(ToolParserName.HERMES, False, ReasoningParserName.THINK, True))
    text = f"I should add.</think>\n\n<tool_call>\n{CALL}\n</tool_call>"
    assert parse(parser, list(text)) == ("", "I should add.", [("add", ARGUMENTS)])
