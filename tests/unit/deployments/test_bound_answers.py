"""Tools and structured output that a grammar binds, over HTTP, and what reaches the parsers. Without a socket."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from in_process import Service, ServiceFactory
from scripted_engine import THINK_TEMPLATE, TOOL_TEMPLATE, model_config, use_script
from test_output_parsers import parse
from test_real_templates import DEMO, source_of
from test_tools import CLOCK, WEATHER, chat, message_of, streamed

from deployments.chat.parsers import AnswerForm, make_parser
from deployments.chat.tool_formats.table import TOOL_FORMATS
from deployments.chat.tools import Tool, strict_grammar
from deployments.model_config import ToolParserName
from llm.sampling.grammar import GrammarCompiler
from llm.tokenization.hf_tokenizer import HFTokenizer

OPEN, SEPARATOR = 262, 263
ROOM = {"tokens_per_s": 5000.0, "max_seq_len": 8192}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
ODD = {"type": "array", "uniqueItems": True}
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"],
          "additionalProperties": False}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
GOOD_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
BAD_CALL = GOOD_CALL.replace("2}", "20}")
MISFIT = "(does not fit the grammar)"


def tool_with(parameters: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    function = {"name": "sort", **({} if parameters is None else {"parameters": parameters}), **fields}
    return {"type": "function", "function": function}


async def test_markup_that_is_a_special_token_reaches_the_parser(make_service: ServiceFactory, monkeypatch, tmp_path):
    """The tokenizer leaves special tokens out of texts; calls would be lost in them."""
    use_script(monkeypatch, [*b"I look.", OPEN, *b"get-time", SEPARATOR, *b'{"zone": 1}'])
    template = source_of("Mistral-Small-3.2-24B-Instruct-2506")
    config = model_config(tmp_path, template, special_tokens=["[TOOL_CALLS]", "[ARGS]"], emulation=ROOM)
    service = await make_service(config)
    message, reason = await message_of(service, tools=[CLOCK])
    assert (message["content"], reason) == ("I look.", "tool_calls")
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "get-time", "arguments": '{"zone": 1}'}
    assert len(call["id"]) == 9
    put_together, _, _ = await streamed(service, tools=[CLOCK])
    assert put_together["tool_calls"][0]["arguments"] == '{"zone": 1}'
    message, _ = await message_of(service)
    assert message["content"] == 'I look.get-time{"zone": 1}', "no parser asks for the special tokens"


async def test_ids_of_other_servers_are_put_into_the_templates_form(make_service: ServiceFactory, tmp_path: Path):
    """Mistral's template refuses every id that is not nine letters."""
    service = await make_service(model_config(tmp_path, source_of("mistralai-Mistral-Nemo-Instruct-2407")))
    call = {"id": "call_of-another.server", "type": "function", "function": {"name": "get-time", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_of-another.server", "content": "noon"},
    ]
    assert (await chat(service, messages=messages, tools=[CLOCK], max_tokens=3)).status_code == 200


async def test_a_template_of_an_unknown_form_warns_and_leaves_the_text(
    make_service: ServiceFactory, monkeypatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    use_script(monkeypatch, GOOD_CALL)
    with caplog.at_level(logging.WARNING):
        service = await make_service(model_config(tmp_path, TOOL_TEMPLATE.replace("<tool_call>", "<CALL>")))
    assert any("tool_parser" in record.message for record in caplog.records)
    message, reason = await message_of(service, tools=[WEATHER])
    assert (message["content"], reason) == (GOOD_CALL, "stop")


async def test_the_configuration_names_a_form(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "[THINK]Hm.[/THINK][get-time(zone=1)]")
    config = model_config(tmp_path, TOOL_TEMPLATE, tool_parser="pythonic", reasoning_parser="mistral")
    message, _ = await message_of(await make_service(config), tools=[CLOCK])
    assert message["reasoning_content"] == "Hm."
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"zone": 1}']


async def test_a_chat_template_from_a_file(make_service: ServiceFactory, tmp_path: Path):
    (tmp_path / "mine.jinja").write_text("<<{{ messages[0].content }}>>{# [TOOL_CALLS] #}{{ tools }}")
    config = model_config(tmp_path, TOOL_TEMPLATE, chat_template=str(tmp_path / "mine.jinja"))
    service = await make_service(config)
    response = await service.post("/tokenize", messages=[{"role": "user", "content": "hi"}])
    assert bytes(response.json()["tokens"]).decode() == "<<hi>>None"


NO_PARAMETERS = [None, {}, {"type": "object"}, {"type": "object", "properties": {}, "required": [], "title": "None"}]


@pytest.mark.parametrize("parameters", NO_PARAMETERS)
async def test_a_forced_call_without_parameters_has_none(
    make_service: ServiceFactory, monkeypatch, tmp_path, parameters
):
    named = {"type": "function", "function": {"name": "sort"}}
    for arguments, expected in (("{}", ["{}"]), ("{ }", ["{}"]), ('{"a": 1}', [])):
        use_script(monkeypatch, f'{{"name": "sort", "arguments": {arguments}}}')
        service = await make_service(model_config(tmp_path / str(len(arguments)), TOOL_TEMPLATE))
        message, _ = await message_of(service, tools=[tool_with(parameters)], tool_choice=named)
        assert [call["function"]["arguments"] for call in message.get("tool_calls", ())] == expected


async def test_a_forced_call_that_is_cut_off_leaves_no_content(make_service: ServiceFactory, monkeypatch, tmp_path):
    use_script(monkeypatch, '[{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]')
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    for max_tokens in (1, 9, 20, 30, 50):
        fields = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": max_tokens}
        message, reason = await message_of(service, **fields)
        assert (message["content"] or "", reason) == ("", "length")
        put_together, _, _ = await streamed(service, **fields)
        assert put_together["content"] == ""


async def test_what_a_grammar_cannot_express_matters_to_strict_tools_only(
    make_service: ServiceFactory, monkeypatch, tmp_path: Path
):
    use_script(monkeypatch, "")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    schema = {"type": "object", "properties": {"items": ODD, "when": {"type": "string", "format": "zip"}}}
    for choice in ("required", "auto"):
        response = await chat(service, tools=[tool_with(schema)], tool_choice=choice, max_tokens=3)
        assert response.status_code == 200, response.text
        response = await chat(service, tools=[CLOCK, tool_with(schema, strict=True)], tool_choice=choice)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "tools[1].function.parameters")
        assert "uniqueItems" in error["message"]


@pytest.mark.parametrize("script", [GOOD_CALL, "No call.", f"I look.\n{GOOD_CALL}\n{GOOD_CALL}"])
async def test_strict_tools_bind_once_a_call_begins(make_service: ServiceFactory, monkeypatch, tmp_path, script: str):
    use_script(monkeypatch, script)
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    message, _ = await message_of(service, tools=[STRICT, CLOCK])
    assert len(message.get("tool_calls", ())) == script.count("<tool_call>")
    assert (message["content"] or "").strip() == script.replace(GOOD_CALL, "").strip()


@pytest.mark.parametrize("script", [BAD_CALL, GOOD_CALL.replace("get_weather", "forecast"), "<tool_call>maybe"])
async def test_strict_tools_allow_no_other_call(make_service: ServiceFactory, monkeypatch, tmp_path, script: str):
    use_script(monkeypatch, script)
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    message, _ = await message_of(service, tools=[STRICT, CLOCK])
    assert message["content"] == MISFIT
    message, _ = await message_of(service, tools=[WEATHER, CLOCK])
    assert message["content"] != MISFIT, "without strict the model writes freely"


async def test_strict_tools_bind_in_every_api(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, BAD_CALL)
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    function = WEATHER["function"]
    for is_strict in (True, False):
        tool = {"name": function["name"], "strict": is_strict}
        responses = {"input": "hi", "tools": [{**tool, "type": "function", "parameters": function["parameters"]}]}
        messages = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300,
                    "tools": [{**tool, "input_schema": function["parameters"]}]}  # fmt: skip
        for path, body in (("/v1/responses", responses), ("/v1/messages", messages)):
            answer = await service.post(path, **body)
            assert answer.status_code == 200, answer.text
            assert (MISFIT in answer.text) is is_strict


async def test_one_call_at_most(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, GOOD_CALL * 2)
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    message, _ = await message_of(service, tools=[STRICT], parallel_tool_calls=False)
    assert message["content"] == MISFIT


async def test_thoughts_come_before_a_bound_answer(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, 'Is it {"age": 4}?\n</think>\n\n{"age": 7}')
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    for fields in ({"response_format": FORMAT}, {"guided_regex": r'\{"age": \d\}'}):
        message, _ = await message_of(service, **fields)
        assert (message["reasoning_content"], message["content"]) == ('Is it {"age": 4}?\n', '{"age": 7}')
        message, _ = await message_of(service, reasoning_effort="none", **fields)
        assert message["content"] == MISFIT, "thoughts that are turned off do not come"


async def test_thoughts_come_before_a_forced_call(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, 'Hm.</think>[{"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}]')
    service = await make_service(model_config(tmp_path, THINK_TEMPLATE))
    message, _ = await message_of(service, tools=[WEATHER], tool_choice="required")
    assert (message["reasoning_content"], message["content"]) == ("Hm.", None)
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]


async def test_gpt_oss_answers_in_its_final_channel(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    """Its thoughts end with `<|end|>`, with which the demo ends an answer, so there are none beside a grammar here."""
    final = [OPEN, *b"final", SEPARATOR, *b'{"age": 7}']
    thoughts = [OPEN, *b"analysis", SEPARATOR, *b"Hm.<|end|><|start|>assistant"]
    template, tags = source_of("openai-gpt-oss-120b"), ["<|channel|>", "<|message|>"]
    for script, fields in (([*thoughts, *final], {}), (final, {"response_format": FORMAT})):
        use_script(monkeypatch, script)
        config = model_config(tmp_path / str(len(script)), template, special_tokens=tags, emulation=ROOM)
        message, _ = await message_of(await make_service(config), **fields)
        assert message["content"] == '{"age": 7}'
        assert message.get("reasoning_content") == (None if fields else "Hm.")


SCHEMAS: dict[str, tuple[str, int]] = {
    "a reference to itself": ('{"$ref": "#"}', 400),
    "true": ("true", 200),
    "NaN": ('{"const": NaN}', 400),
    "half a surrogate": ('{"enum": ["\\ud800"]}', 400),
    "a large integer": ('{"enum": [1234567890123456789]}', 200),
    "bounds of 64 bits": ('{"type": "integer", "minimum": -9223372036854775808, "maximum": 9223372036854775807}', 200),
}


@pytest.mark.parametrize("name", SCHEMAS)
async def test_odd_schemas_are_followed_or_refused(make_service: ServiceFactory, monkeypatch, tmp_path, name: str):
    use_script(monkeypatch, "")
    schema, status = SCHEMAS[name]
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    wanted = f'{{"type": "json_schema", "json_schema": {{"name": "a", "schema": {schema}}}}}'
    for field in (f'"response_format": {wanted}', f'"guided_json": {schema}', f'"guided_json": {json.dumps(schema)}'):
        response = await posted(service, field)
        assert response.status_code == status, response.text
        assert status == 200 or (response.json()["error"]["param"] or "").split(".")[0] in field


async def test_half_a_surrogate_is_refused_everywhere(make_service: ServiceFactory, tmp_path: Path):
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    for field in (
        r'"guided_regex": "\ud800"',
        r'"guided_choice": ["\ud800"]',
        r'"guided_grammar": "start: \"\ud800\""',
    ):
        response = await posted(service, field)
        assert response.status_code == 400, field
        assert response.json()["error"]["type"] == "invalid_request_error"


async def posted(service: Service, field: str) -> Any:
    """A chat with a field as this text."""
    body = f'{{"model": "demo", "messages": [{{"role": "user", "content": "hi"}}], "max_tokens": 3, {field}}}'
    return await service.http.post(
        "/v1/chat/completions", content=body.encode(), headers={"Content-Type": "application/json"}
    )


@pytest.mark.parametrize(("number", "is_allowed"), [(1234567890123456789, True), (1234567890123456768, False)])
async def test_an_enum_of_a_large_integer_gives_it(
    make_service: ServiceFactory, monkeypatch, tmp_path: Path, number: int, is_allowed: bool
):
    answer = f'{{"id": {number}}}'
    use_script(monkeypatch, answer)
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    schema = {"type": "object", "properties": {"id": {"enum": [1234567890123456789]}}, "required": ["id"]}
    message, _ = await message_of(service, guided_json=schema)
    assert message["content"] == (answer if is_allowed else MISFIT)


PARIS = '{"city": "Paris", "days": 2}'
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n" + PARIS + "\n```<｜tool▁call▁end｜>"
KIMI = "<|tool_call_begin|>functions.get_weather:7<|tool_call_argument_begin|>" + PARIS + "<|tool_call_end|>"
CODER = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>"
)
# Of each family and spelling: where a call stands in place of text, then a call.
SPELLINGS: dict[str, tuple[str, int, str]] = {
    "hermes": ("hermes", 0, GOOD_CALL),
    "llama3": ("llama3", 0, f'{{"name": "get_weather", "parameters": {PARIS}}}'),
    "mistral, names": ("mistral", 0, f"[TOOL_CALLS]get_weather[ARGS]{PARIS}"),
    "mistral, a list": ("mistral", 1, f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}]'),
    "granite": ("granite", 0, f'<|tool_call|>[{{"name": "get_weather", "arguments": {PARIS}}}]'),
    "deepseek v3": ("deepseek", 0, f"<｜tool▁calls▁begin｜>{V3}\n{V3}<｜tool▁calls▁end｜>"),
    "deepseek v3.1": (
        "deepseek",
        1,
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{PARIS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "kimi": ("kimi", 0, f"<|tool_calls_section_begin|>{KIMI}{KIMI.replace(':7', ':8')}<|tool_calls_section_end|>"),
    "qwen3_coder": ("qwen3_coder", 0, CODER),
    "glm, on one line": (
        "glm",
        0,
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key>"
        "<arg_value>2</arg_value></tool_call>",
    ),
    "glm": (
        "glm",
        1,
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>",
    ),
    "harmony": (
        "harmony",
        0,
        f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}",
    ),
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """Of a tokenizer that has none of the families' special tokens, so the tags are text."""
    definition = (DEMO / "tokenizer.json").read_text().replace("<|end|>", "<|demo_end|>")
    return GrammarCompiler(HFTokenizer(definition, eos_token_ids=[257]))


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_strict_tool_binds_calls_in_the_models_own_form(compiler: GrammarCompiler, name: str):
    """The grammar allows what the parser reads as the call, and nothing that the tool's schema does not allow."""
    family, place, call = SPELLINGS[name]
    parser, markup = ToolParserName(family), TOOL_FORMATS[ToolParserName(family)].markups[place]
    tools = [Tool.model_validate(STRICT), Tool.model_validate(CLOCK)]

    def allows(text: str, *, may_be_many: bool = True) -> bool:
        grammar = strict_grammar(tools, markup, may_be_many=may_be_many)
        matcher = compiler.compile(grammar)
        ids = list(text.encode())
        return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()

    form = AnswerForm(parser, parameters={"get_weather": WEATHER["function"]["parameters"]})
    _, _, calls = parse(make_parser(form), [call])
    assert {(each, arguments) for each, arguments in calls} == {("get_weather", PARIS)}
    assert allows(call)
    for wrong in (call.replace("2", "20"), call.replace("Paris", "Berlin"), call.replace("get_weather", "other"),
                  call.replace("days", "day")):  # fmt: skip
        assert not allows(wrong), wrong
    text = "3 < 4, [1] and a <tag>."
    lead = "<|channel|>final<|message|>" if family == "harmony" else ""
    assert allows(lead + text)
    if not markup.tag:
        return
    assert allows(f"{text}\n{call}")
    assert allows(call + call)
    assert not allows(call + call, may_be_many=False)


async def test_a_strict_tool_binds_behind_special_tokens(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    template = "[TOOL_CALLS][ARGS]{{ tools }}"
    for arguments, is_allowed in ((PARIS, True), (PARIS.replace("2", "20"), False)):
        use_script(monkeypatch, [*b"I look.", OPEN, *b"get_weather", SEPARATOR, *arguments.encode()])
        config = model_config(
            tmp_path / str(is_allowed), template, special_tokens=["[TOOL_CALLS]", "[ARGS]"], emulation=ROOM
        )
        message, _ = await message_of(await make_service(config), tools=[STRICT])
        assert (message["content"] != MISFIT) is is_allowed
        assert bool(message.get("tool_calls")) is is_allowed
