"""What a model once wrote, and a client sends back, is never refused; each form of it reaches the model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import Service, ServiceFactory
from scripted_engine import TOOL_TEMPLATE, model_config, use_script

from deployments.chat.messages import ChatMessage
from deployments.chat.template_turns import render_turns
from llm.errors import InvalidRequestError
from llm.tokenization.hf_tokenizer import HFTokenizer

CHAT = "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
BY = {"role": "user", "content": "and?"}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "18"}


def call(**function: object) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}


async def prompt(service: Service, *messages: dict) -> str:
    """What the template made of the messages, by the tokens that the server counts."""
    answer = await service.post(CHAT, messages=list(messages), max_tokens=1)
    assert answer.status_code == 200, answer.text
    tokens = await service.post("/tokenize", messages=list(messages))
    text = await service.post("/detokenize", tokens=tokens.json()["tokens"])
    return text.json()["prompt"]


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([call(name="add", arguments='{"a": 1, "b": ')], '"{\\"a\\": 1, \\"b\\": "'),
        ([call(name="add", arguments="[1]")], '"[1]"'),
        ([call(name="add", arguments={"a": 1})], '{"a": 1}'),
        ([call(name="add", arguments=None)], "add {}"),
        ([call(name="add")], "add {}"),
        ([call(name="a tool.of/odd\nname", arguments="{}"), RESULT], "a tool.of/odd\nname"),
        ([call(name="x" * 500, arguments="{}")], "x" * 500),
        ([{"role": "assistant", "tool_calls": [{"id": 7, "type": 7, "function": {"name": 7, "arguments": 7}}]},
          {"role": "tool", "tool_call_id": 7, "content": "18"}], '7 "7"'),
        ([{"role": "assistant", "tool_calls": [{"index": 0, "id": None, "type": None, "function": {"name": "f"}}]},
          {"role": "tool", "content": "18"}], "tool: 18"),
        ([{"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}]}],
         'f "x"'),
        ([{"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
          {"role": "function", "name": "f", "content": "18"}], "tool: 18"),
        ([{"role": "assistant", "content": "yes", "tool_calls": [], "refusal": None, "audio": None}], "assistant: yes"),
        ([{"role": "assistant", "content": "yes", "tool_calls": None, "function_call": None}], "assistant: yes"),
        ([{"role": "assistant"}], "assistant: user: and?"),
        ([{"role": "assistant", "content": None}], "assistant: user: and?"),
        ([{"role": "assistant", "content": ""}], "assistant: user: and?"),
        ([{"role": "assistant", "content": []}], "assistant: user: and?"),
        ([{"role": "assistant", "reasoning_content": "hm"}], "assistant: user: and?"),
        ([{"role": "assistant", "content": None, "reasoning": "hm"}], "assistant: user: and?"),
        ([{"role": "assistant", "content": "yes", "reasoning_content": [{"type": "text"}]}], "assistant: yes"),
        ([{"role": "assistant", "content": [{"type": "output_text", "text": "yes"}, None, "no"]}], "yes\nno"),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "I won't"}]}], "assistant: I won't"),
        ([{"role": "assistant", "content": [{"type": "wizardry", "x": 1}, {"type": "text", "text": "yes"}]}],
         "assistant: yes"),
        ([{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text"}]}],
         "assistant: user: and?"),
        ([call(name="f", arguments=""), {**RESULT, "content": None}], "tool: user: and?"),
        ([call(name="f", arguments=""), {**RESULT, "content": []}], "tool: user: and?"),
        ([call(name="f", arguments=""),
          {**RESULT, "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "a cat"}]}],
         "tool: [image]\na cat"),
        ([call(name="f", arguments=""), {**RESULT, "content": [{"type": "input_file", "file": {}}]}], "tool: [file]"),
    ],
)  # fmt: skip
async def test_chats_accept_it(
    make_service: ServiceFactory, monkeypatch, tmp_path: Path, messages: list[dict], told: str
):
    use_script(monkeypatch, "Done.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    assert told in await prompt(service, HI, *messages, BY)


def tool_template(loop: str) -> str:
    return (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
        + loop
        + ("{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Callable[[str], HFTokenizer]:
    """Makes tokenizers of chat templates."""

    def make(template: str) -> HFTokenizer:
        directory = tmp_path / str(len(template))
        directory.mkdir()
        return HFTokenizer.from_pretrained(model_config(directory, template).model)

    return make


BROKEN = ChatMessage.model_validate(call(name="f", arguments='{"a": ')).turn()


def test_templates_that_want_an_object_get_one(tokenizer):
    """As Qwen3-Coder's, which goes through the arguments one by one."""
    template = tool_template("{% for k, v in call.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}")
    text = render_turns(tokenizer(template), [HI, BROKEN]).text
    assert '<arguments>{"a": ' in text


NO_LATE_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


def test_templates_that_want_the_system_message_first_get_it_there(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    late = {"role": "system", "content": "Be kind."}
    text = render_turns(tokenizer(NO_LATE_SYSTEM), [system, HI, late, BY]).text
    assert text == "system: Be brief.\n\nBe kind.\nuser: hi\nuser: and?\n"
    free = NO_LATE_SYSTEM.replace("not loop.first", "false")
    text = render_turns(tokenizer(free), [system, HI, late, BY]).text
    assert text == "system: Be brief.\nuser: hi\nsystem: Be kind.\nuser: and?\n", "it stays in its place where it may"


def test_templates_that_want_turns_to_alternate_get_the_users_as_one(tokenizer):
    """Agents put what they know of their surroundings into a message of its own."""
    template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    text = render_turns(tokenizer(template), [HI, BY, {"role": "assistant", "content": "yes"}, HI]).text
    assert text == "user: hi\n\nand?\nassistant: yes\nuser: hi\n"


def test_templates_without_system_messages_get_their_text_with_the_users(tokenizer):
    """As Gemma 2's, which agents could not use else."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    text = render_turns(tokenizer(template), [{"role": "system", "content": "Be brief."}, HI, BROKEN]).text
    assert text == "user: Be brief.\n\nhi\nassistant: \n"


def test_what_a_template_refuses_for_good_is_told_in_its_own_words(tokenizer):
    template = "{{ raise_exception('Roles must alternate.') }}"
    with pytest.raises(InvalidRequestError, match=r"^Roles must alternate\.$"):
        render_turns(tokenizer(template), [HI, {"role": "system", "content": "x"}, BROKEN])


@pytest.mark.parametrize("content", ["The answer is ", " The\n", "a</think>b"])
def test_the_last_message_goes_on_where_it_ends(tokenizer, content: str):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}<assistant>"
    last = {"role": "assistant", "content": content}
    text = render_turns(tokenizer(template), [HI, last], is_continued=True).text
    assert text == f"<user>hi</user>\n<assistant>{content.lstrip()}"


async def test_a_chat_goes_on_with_its_last_message(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    use_script(monkeypatch, "42.")
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    messages = [HI, {"role": "assistant", "content": "It is "}]
    answer = await service.post(CHAT, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert answer.json()["choices"][0]["message"]["content"] == "42."
    with_prompt = await service.post(CHAT, messages=messages)
    difference = with_prompt.json()["usage"]["prompt_tokens"] - answer.json()["usage"]["prompt_tokens"]
    assert difference == len("assistant: "), "one token a byte"
    for wrong in ([HI], [HI, {"role": "assistant", "content": ""}], [HI, call(name="f", arguments="{}")]):
        refused = await service.post(CHAT, messages=wrong, continue_final_message=True)
        assert refused.json()["error"]["param"] == "continue_final_message"


async def test_what_a_stream_gave_can_be_sent_back(make_service: ServiceFactory, monkeypatch, tmp_path: Path):
    """Deltas put together without care, with everything that they hold."""
    use_script(monkeypatch, '<tool_call>{"name": "add", "arguments": {"a": 17}}</tool_call>')
    service = await make_service(model_config(tmp_path, TOOL_TEMPLATE))
    tools = [{"type": "function", "function": {"name": "add"}}]
    answer = await service.post(CHAT, messages=[HI], tools=tools, stream=True)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    message: dict = {}
    for event in events:
        for name, value in event["choices"][0]["delta"].items():
            if name == "tool_calls":
                for piece in value:
                    known = message.setdefault("tool_calls", [])
                    if piece["index"] == len(known):
                        known.append(piece)
                    else:
                        known[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
            else:
                message[name] = value
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "18"}
    again = await service.post(CHAT, messages=[HI, message, result], tools=tools)
    assert again.status_code == 200, again.text
    assert again.headers["x-rayline-ignored"] == "messages[1].tool_calls[0].index"
