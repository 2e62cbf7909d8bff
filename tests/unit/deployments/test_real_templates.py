"""Chat templates of real models: what they make of a chat, and what they say of the model's format."""

import json
from datetime import datetime
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils import chat_template_utils

from deployments.chat.history import HistoryStyle
from deployments.chat.messages import ChatMessage
from deployments.chat.model_format import ModelFormat, find_format, prompt_reasoning
from deployments.chat.template_turns import render_turns
from deployments.model_config import ReasoningParserName, ToolParserName
from llm.errors import InvalidRequestError
from llm.tokenization import chat_template as chat_template_module
from llm.tokenization.chat_template import ChatTemplate
from llm.tokenization.hf_tokenizer import HFTokenizer

TEMPLATES = Path(__file__).parents[2] / "templates"
DEMO = Path(__file__).parents[3] / "configs" / "demo"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

FORMATS: dict[str, tuple[str | None, str | None]] = {
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (None, None),
    "GLM-4.6": ("glm", "think"),
    "GLM-4.7-Flash": ("glm", "think"),
    "LFM2-8B-A1B": (None, None),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral", None),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", None),
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", None),
    "Qwen-Qwen3-0.6B": ("hermes", "think"),
    "Qwen3-Coder": ("qwen3_coder", None),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("deepseek", "think"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek", "think"),
    "google-gemma-2-2b-it": (None, None),
    "ibm-granite-granite-3.3-2B-Instruct": ("granite", "think"),
    "ibm-granite-granite-4.0": ("hermes", None),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3", None),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama3", None),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral", "mistral"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", None),
    "moonshotai-Kimi-K2": ("kimi", None),
    "openai-gpt-oss-120b": ("harmony", "harmony"),
    "vllm-llama3.2-pythonic": ("pythonic", None),
}
TEACHES_NO_TOOLS = {
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-V3.1", "google-gemma-2-2b-it",
}  # fmt: skip
SHOWS_CALLS = [name for name, (tools, _) in FORMATS.items() if tools and "granite-3.3" not in name]


def source_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer_of(name: str) -> HFTokenizer:
    template = ChatTemplate(source_of(name), origin=name, special_tokens=TOKENS)
    definition = (DEMO / "tokenizer.json").read_text(encoding="utf-8")
    return HFTokenizer(definition, templates={"default": template})


@cache
def format_of(name: str) -> ModelFormat:
    return find_format(tokenizer_of(name), ToolParserName.AUTO, ReasoningParserName.AUTO)


def call(call_id: str, value: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "look_up", "arguments": {"key": value, "n": 3}}}


TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks <up> ä words",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "what"}, "n": {"type": "integer"}},
            "required": ["key"],
        },
    },
}
SYSTEM = {"role": "system", "content": "Be short."}
QUESTION = {"role": "user", "content": "What is ä?"}
CALLED = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call("abcdefgh1", "first")]}]
ANSWERED = [*CALLED, {"role": "tool", "tool_call_id": "abcdefgh1", "name": "look_up", "content": "a letter"}]
CHATS: dict[str, list[dict[str, Any]]] = {
    "a question": [QUESTION],
    "several turns": [QUESTION, {"role": "assistant", "content": "A letter."}, {"role": "user", "content": "And ö?"}],
    "thoughts": [
        QUESTION,
        {"role": "assistant", "content": "A letter.", "reasoning_content": "Hm."},
        {"role": "user", "content": "And ö?"},
    ],
    "a call": CALLED,
    "a result": ANSWERED,
    "a result and an answer": [
        *ANSWERED, {"role": "assistant", "content": "A letter."}, {"role": "user", "content": "And ö?"},
    ],
    "two results": [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call("abcdefgh1", "first"), call("abcdefgh2", "second")]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "name": "look_up", "content": "one result"},
        {"role": "tool", "tool_call_id": "abcdefgh2", "name": "look_up", "content": "other result"},
    ],
}  # fmt: skip


class Noon(datetime):
    """The time that templates are told."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return datetime(2026, 11, 29, 12)


def test_every_template_is_in_the_table():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FORMATS)


def expected_of(
    name: str, chat: list[dict[str, Any]], tools: list[dict[str, Any]] | None, is_prompt: bool
) -> str | None:
    """What transformers makes of a chat; None where the template refuses it."""
    try:
        (text,), _ = chat_template_utils.render_jinja_template(
            [chat], tools, chat_template=source_of(name), add_generation_prompt=is_prompt, documents=None, **TOKENS
        )
    except (jinja2.TemplateError, TypeError, AttributeError):
        return None
    return text


@pytest.mark.parametrize("name", FORMATS)
def test_rendered_as_transformers_renders_it(name: str, monkeypatch: pytest.MonkeyPatch):
    """With tools and without, with a system message and without; and refused by both or by none."""
    for module in (chat_template_module, chat_template_utils):
        monkeypatch.setattr(module, "datetime", Noon)
    tokenizer = tokenizer_of(name)
    num_rendered = 0
    for messages, system, tools, is_prompt in product(CHATS.values(), ([], [SYSTEM]), (None, [TOOL]), (True, False)):
        chat = [*system, *messages]
        expected = expected_of(name, chat, tools, is_prompt)
        if expected is None:
            with pytest.raises(InvalidRequestError):
                tokenizer.render_chat(chat, add_generation_prompt=is_prompt, tools=tools)
        else:
            ours = tokenizer.render_chat(chat, add_generation_prompt=is_prompt, tools=tools)
            assert ours.disguise.reveal(ours.text) == expected
            num_rendered += 1
    assert num_rendered >= 12


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_found_by_the_template(name: str):
    found = format_of(name)
    assert (found.tool_parser, found.reasoning_parser) == FORMATS[name]
    assert found.is_teaching is (name not in TEACHES_NO_TOOLS)
    is_unknown = found.is_teaching and found.tool_parser is None
    assert (found.warning is not None) is is_unknown, "whoever runs the server is told, and only then"


@pytest.mark.parametrize("name", SHOWS_CALLS)
@pytest.mark.parametrize("chat", ["a call", "a result", "two results"])
def test_earlier_calls_and_results_reach_the_model(name: str, chat: str):
    """Whatever form the template wants them in, and whatever ids another server has given them."""
    tokenizer, style = tokenizer_of(name), format_of(name).history
    text = json.dumps(CHATS[chat]).replace("abcdefgh", "call_of-another.server:")
    rendered = tokenizer.render_chat(style.messages(json.loads(text)), tools=style.tools([TOOL])).text
    results = [message["content"] for message in CHATS[chat] if message["role"] == "tool"]
    calls = [each["function"]["arguments"]["key"] for message in CHATS[chat] for each in message.get("tool_calls", ())]
    places = [rendered.index(text) for text in [*calls, *results]]
    assert all(place > rendered.index("What is") for place in places)


def called(content: str | None, *ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [call(each, f"{each} value") for each in ids]}


def answered(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": f"{call_id} result"}


@pytest.mark.parametrize("name", SHOWS_CALLS)
@pytest.mark.parametrize("content", [None, "", "I look it up."])
def test_calls_of_all_turns_reach_the_model_beside_whatever_content(name: str, content: str | None):
    """As a client sends them: null, nothing or a text. DeepSeek-R1's distillates know calls beside null alone."""
    chat = [
        QUESTION, called(content, "one"), answered("one"), {"role": "assistant", "content": "A letter."}, QUESTION,
        called(content, "two", "three"), answered("two"), answered("three"), {"role": "assistant", "content": "So."},
        QUESTION,
    ]  # fmt: skip
    tokenizer, style = tokenizer_of(name), format_of(name).history
    turns = style.messages([ChatMessage.model_validate(message).turn() for message in chat])
    text = render_turns(tokenizer, turns, tools=style.tools([TOOL])).text
    for each in ("one", "two", "three"):
        assert text.index(f"{each} value") < text.index(f"{each} result")
    if "R1-Distill" in name:
        assert text.count(content or "A letter.") == (2 if content else 1)


def test_tools_without_a_description_and_thoughts_reach_gpt_oss():
    name = "openai-gpt-oss-120b"
    tokenizer, style = tokenizer_of(name), format_of(name).history
    bare = {"type": "function", "function": {"name": "look_up"}}
    chat = [dict(message) for message in CHATS["a result"]]
    chat[1]["reasoning_content"] = "I should look."
    text = tokenizer.render_chat(style.messages(chat), tools=style.tools([bare])).text
    assert "analysis<|message|>I should look.<|end|>" in text
    chat[1]["content"] = "I look."
    assert "I look." in tokenizer.render_chat(style.messages(chat), tools=style.tools([bare])).text


def test_a_plain_style_changes_nothing():
    assert HistoryStyle().messages(CHATS["two results"]) == CHATS["two results"]
    assert format_of("Qwen-Qwen3-0.6B").history == HistoryStyle()


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("Qwen-Qwen3-0.6B", {}, None),
        ("Qwen-Qwen3-0.6B", {"enable_thinking": False}, False),
        ("GLM-4.7-Flash", {}, True),
        ("GLM-4.7-Flash", {"enable_thinking": False}, False),
        ("deepseek-ai-DeepSeek-V3.1", {"thinking": True}, True),
        ("deepseek-ai-DeepSeek-V3.1", {}, False),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", {}, True),
    ],
)
def test_whether_the_prompt_opens_the_thoughts(name: str, variables: dict[str, Any], expected: bool | None):
    tokenizer, found = tokenizer_of(name), format_of(name)
    ids = tokenizer.apply_chat_template([QUESTION], **variables)
    assert prompt_reasoning(tokenizer, found.reasoning_parser, ids) is expected
