"""Tool calls and thoughts as the families of models write them: found whole, letter by letter and in any pieces."""

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from test_output_parsers import parse

from deployments.chat.output import ToolCallStart
from deployments.chat.parsers import AnswerForm, make_parser
from deployments.model_config import ReasoningParserName, ToolParserName

PARAMETERS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"enum": ["metric", "imperial"]},
            "hourly": {"type": "boolean"},
            "near": {"type": "array", "items": {"type": "string"}},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    },
    "get-time": {"type": "object", "properties": {}},
}
PARIS = {"city": "Paris", "days": 2}
PARIS_JSON = '{"city": "Paris", "days": 2}'
WEATHER_TAGS = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + PARIS_JSON + "\n```<｜tool▁call▁end｜>"
V31_CALL = "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>" + PARIS_JSON + "<｜tool▁call▁end｜>"
KIMI_CALL = "<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>" + PARIS_JSON + "<|tool_call_end|>"
KIMI_SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
COMMENTARY = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + PARIS_JSON

Calls = list[tuple[str, dict[str, Any]]]
ONE: Calls = [("get_weather", PARIS)]
TWO: Calls = ONE * 2
TIME: Calls = [("get-time", {})]

# parser, text, content, calls
CASES: dict[str, tuple[str, str, str, Calls]] = {
    "mistral list": ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS_JSON}}}]', "", ONE),
    "mistral list with ids": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS_JSON}, "id": "abcdefghi"}}, '
        f'{{"name": "get-time", "arguments": {{}}}}]',
        "",
        ONE + TIME,
    ),
    "mistral name": ("mistral", f"Let me see.[TOOL_CALLS]get_weather[ARGS]{PARIS_JSON}", "Let me see.", ONE),
    "mistral names": ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{PARIS_JSON}[TOOL_CALLS]get-time[ARGS]{{}}", "",
                      ONE + TIME),
    "mistral name and id": ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{PARIS_JSON}", "", ONE),
    "mistral name alone": ("mistral", f"[TOOL_CALLS]get_weather{PARIS_JSON}", "", ONE),
    "mistral text": ("mistral", "A list [1] and [TOOL_CALLS] of nothing", "A list [1] and [TOOL_CALLS] of nothing", []),
    "mistral cut": ("mistral", "[TOOL_CALLS]get_wea", "[TOOL_CALLS]get_wea", []),
    "llama": ("llama3", f'{{"name": "get_weather", "parameters": {PARIS_JSON}}}', "", ONE),
    "llama answers in JSON": ("llama3", '{"city": {"name": "Paris"}} it is', '{"city": {"name": "Paris"}} it is', []),
    "llama call, then JSON": (
        "llama3", f'{{"name": "get_weather", "parameters": {PARIS_JSON}}}; {{"name": 1}}', '; {"name": 1}', ONE,
    ),
    "pythonic": ("pythonic", "[get_weather(city='Paris', days=2)]", "", ONE),
    "pythonic, two": (
        "pythonic", '<|python_start|>[get_weather(city="Paris", days=2), get-time()]<|python_end|>', "", ONE + TIME,
    ),
    "pythonic values": (
        "pythonic",
        "[get_weather(city='a, \\'b\\')', near=[\"x]\", 'y'], hourly=True, note=None, days=-3,)]",
        "",
        [("get_weather", {"city": "a, 'b')", "near": ["x]", "y"], "hourly": True, "note": None, "days": -3})],
    ),
    "pythonic text": ("pythonic", "[1, 2] is a list", "[1, 2] is a list", []),
    "pythonic of another tool": ("pythonic", "[print(x=1)] prints", "[print(x=1)] prints", []),
    "pythonic positional": ("pythonic", "[get_weather('Paris')]", "[get_weather('Paris')]", []),
    "hermes, arguments as text": (
        "hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"days\\": 1}"}</tool_call>', "",
        [("get_weather", {"days": 1})],
    ),
    "hermes without arguments": ("hermes", '<tool_call>\n{"name": "get-time"}\n</tool_call>', "", TIME),
    "coder": ("qwen3_coder", f"I look.\n\n{WEATHER_TAGS}", "I look.\n\n", ONE),
    "coder, two": ("qwen3_coder", f"{WEATHER_TAGS}\n{WEATHER_TAGS}", "", TWO),
    "coder without the outer tag": ("qwen3_coder", WEATHER_TAGS[len("<tool_call>\n"):-len("\n</tool_call>")], "", ONE),
    "coder, none": ("qwen3_coder", "<tool_call>\n<function=get-time>\n</function>\n</tool_call>", "", TIME),
    "coder values": (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>\n\"a\"\n\tb < c\n</parameter><parameter=near>[\"x\"]"
        "</parameter><parameter=hourly>\nTrue\n</parameter><parameter=note>null</parameter><parameter=more>7</parameter>"
        "<parameter=units>metric</parameter><parameter=days>soon</parameter></function></tool_call>",
        "",
        [("get_weather", {"city": '"a"\n\tb < c', "near": ["x"], "hourly": True, "note": None, "more": "7",
                          "units": "metric", "days": "soon"})],
    ),
    "coder text": ("qwen3_coder", "use <function=> or <tool_call> here", "use <function=> or <tool_call> here", []),
    "deepseek v3": (
        "deepseek", f"Hm.<｜tool▁calls▁begin｜>{V3_CALL}\n{V3_CALL}<｜tool▁calls▁end｜>", "Hm.", TWO,
    ),
    "deepseek v3.1": ("deepseek", f"<｜tool▁calls▁begin｜>{V31_CALL}{V31_CALL}<｜tool▁calls▁end｜>", "", TWO),
    "deepseek without the outer token": ("deepseek", V31_CALL, "", ONE),
    "deepseek text": ("deepseek", "<｜tool▁calls▁begin｜>none", "<｜tool▁calls▁begin｜>none", []),
    "glm": (
        "glm",
        "I look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        "I look.\n",
        ONE,
    ),
    "glm on one line": (
        "glm",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key>"
        "<arg_value>2</arg_value></tool_call><tool_call>get-time</tool_call>",
        "",
        ONE + TIME,
    ),
    "glm text": ("glm", "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
    "kimi": ("kimi", "I look." + KIMI_SECTION.format(KIMI_CALL + KIMI_CALL.replace(":0", ":1")), "I look.", TWO),
    "kimi text": ("kimi", KIMI_SECTION.format(""), KIMI_SECTION.format(""), []),
    "granite": ("granite", f'<|tool_call|>[{{"name": "get_weather", "arguments": {PARIS_JSON}}}]', "", ONE),
    "granite, two": (
        "granite",
        f'<|tool_call|> [{{"name": "get_weather", "arguments": {PARIS_JSON}}}, '
        '{"arguments": {}, "name": "get-time"}]',
        "",
        ONE + TIME,
    ),
    "granite text": ("granite", "<|tool_call|>[]", "<|tool_call|>[]", []),
    "harmony": ("harmony", COMMENTARY + "<|call|>", "", ONE),
    "harmony, role first": (
        "harmony", " to=functions.get_weather<|channel|>commentary json<|message|>" + PARIS_JSON, "", ONE,
    ),
    "harmony, preamble": (
        "harmony",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + COMMENTARY,
        "I look.",
        ONE,
    ),
    "harmony answer": ("harmony", "<|channel|>final<|message|>4 < 5<|return|>", "4 < 5", []),
    "harmony without channels": ("harmony", "Just text.", "Just text.", []),
    "harmony cut": ("harmony", "<|channel|>final", "", []),
}  # fmt: skip
FAMILIES = sorted({case[0] for case in CASES.values()})


def form_of(name: str) -> AnswerForm:
    return AnswerForm(ToolParserName(name), parameters=PARAMETERS)


def read(form: AnswerForm, pieces: list[str]) -> tuple[str, str, Calls]:
    content, reasoning, calls = parse(make_parser(form), pieces)
    return content, reasoning, [(name, json.loads(arguments)) for name, arguments in calls]


def pieces_of(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_whole_letter_by_letter_and_cut_once(name: str):
    parser, text, content, calls = CASES[name]
    cuts = [[text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))]
    for pieces in cuts:
        assert read(form_of(parser), pieces) == (content, "", calls), pieces


@given(st.data())
def test_any_cut_gives_the_same(data: st.DataObject):
    parser, text, content, calls = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    assert read(form_of(parser), pieces_of(data, text)) == (content, "", calls)


def fragments(family: str) -> list[str]:
    """What texts of a family are made of, so that broken ones come about."""
    texts = [text for parser, text, _, _ in CASES.values() if parser == family]
    return sorted({text[i : i + n] for text in texts for n in (1, 7, 25) for i in range(0, len(text), n)})


@settings(max_examples=300)
@given(st.data())
def test_broken_markup_reads_the_same_in_any_pieces(data: st.DataObject):
    """Also where a text is cut off, or is none that any model should write, and nothing raises."""
    family = data.draw(st.sampled_from(FAMILIES))
    text = "".join(data.draw(st.lists(st.sampled_from(fragments(family)), max_size=8)))
    whole = parse(make_parser(form_of(family)), [text])
    assert parse(make_parser(form_of(family)), list(text)) == whole
    assert parse(make_parser(form_of(family)), pieces_of(data, text)) == whole
    if not whole[2] and family != "harmony":
        assert whole[0].strip() == text.strip(), "what is no call is content"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3]])
def test_cut_off_anywhere_arguments_are_a_beginning(name: str):
    """A limit may end an answer at any letter: what was given until then is the beginning of the whole."""
    parser, text, _, _ = CASES[name]
    content, _, whole = parse(make_parser(form_of(parser)), [text])
    for end in range(len(text)):
        content_so_far, _, calls = parse(make_parser(form_of(parser)), [text[:end]])
        assert content.startswith(content_so_far) or not calls
        for (name_so_far, arguments), (name_at_last, all_arguments) in zip(calls, whole, strict=False):
            assert name_so_far == name_at_last
            assert all_arguments.startswith(arguments)


@pytest.mark.parametrize("family", ["qwen3_coder", "glm"])
def test_long_texts_are_streamed(family: str):
    """An argument that is a whole file comes as it is written, not at its end."""
    _, text, _, _ = CASES["coder" if family == "qwen3_coder" else "glm"]
    start = text[: text.index("Paris")]
    parser = make_parser(form_of(family))
    assert any(isinstance(event, ToolCallStart) for event in parser.push(start))
    assert all(parser.push("line of code\n") for _ in range(3))


def ids_of(family: str, text: str) -> list[str]:
    parser = make_parser(form_of(family))
    return [event.call_id for event in [*parser.push(text), *parser.finish()] if isinstance(event, ToolCallStart)]


def test_ids_are_what_the_templates_take():
    for name in ("mistral list with ids", "mistral names"):
        ids = ids_of("mistral", CASES[name][1])
        assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)
        assert len(set(ids)) == 2
    assert ids_of("mistral", CASES["mistral name and id"][1]) == ["abcdefghi"]
    assert ids_of("kimi", CASES["kimi"][1]) == ["functions.get_weather:0", "functions.get_weather:1"]
    again = ids_of("kimi", KIMI_SECTION.format(KIMI_CALL * 2))
    assert len(set(again)) == 2, "an id that was there before is not used again"


THOUGHTS = {
    "mistral": ("mistral", False, "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
    "mistral, opened by the prompt": ("mistral", True, "Hm.[/THINK]\n\nYes.", "Hm.", "Yes."),
    "harmony": (
        "harmony", False, "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "Hm.", "Yes.",
    ),
    "harmony, cut": ("harmony", False, "<|channel|>analysis<|message|>Hm. <|e", "Hm. ", ""),
    "think": ("think", True, "Hm.\n</think>\n\nYes.", "Hm.\n", "Yes."),
}  # fmt: skip


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts(name: str):
    family, is_open, text, reasoning, content = THOUGHTS[name]
    form = AnswerForm(reasoning_parser=ReasoningParserName(family), is_reasoning=is_open)
    for pieces in ([text], list(text)):
        assert parse(make_parser(form), pieces) == (content, reasoning, [])


def test_thoughts_then_a_call():
    harmony = AnswerForm(ToolParserName.HARMONY, False, ReasoningParserName.HARMONY, parameters=PARAMETERS)
    text = "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant" + COMMENTARY
    assert read(harmony, list(text)) == ("", "Look.", ONE)
    kimi = AnswerForm(ToolParserName.KIMI, False, ReasoningParserName.THINK, is_reasoning=True, parameters=PARAMETERS)
    text = "Look." + KIMI_SECTION.format(KIMI_CALL)
    assert read(kimi, list(text)) == ("", "Look.", ONE), "Kimi calls out of its thoughts"


def test_a_forced_call_cut_off_leaves_no_content():
    for family in ToolParserName:
        if family in (ToolParserName.AUTO, ToolParserName.NONE):
            continue
        form = AnswerForm(family, is_forced=True)
        text = f'[{{"name": "get_weather", "arguments": {PARIS_JSON}}}]'
        for end in range(len(text)):
            content, _, _ = parse(make_parser(form), [text[:end]])
            assert content == ""
        assert read(form, list(text)) == ("", "", ONE)
