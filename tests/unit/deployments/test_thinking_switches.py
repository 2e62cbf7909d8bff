"""The ways in which clients turn a model's thinking on and off, each in the words of the server it was made for."""

from pathlib import Path

import pytest
from in_process import Service, ServiceFactory
from scripted_engine import model_config

from deployments.api.anthropic.schemas import MessagesRequest

HI = [{"role": "user", "content": "hi"}]
TEMPLATE = (
    "{{ messages[0].content }} think={{ enable_thinking | default('unset') }} {{ thinking | default('unset') }}"
    " effort={{ reasoning_effort | default('unset') }}"
)


async def told(service: Service, **fields: object) -> str:
    """The prompt that a chat's fields give."""
    answer = await service.post("/tokenize", messages=HI, return_token_strs=True, **fields)
    assert answer.status_code == 200, answer.text
    text = await service.post("/detokenize", tokens=answer.json()["tokens"])
    return text.json()["prompt"].partition("hi ")[2]


@pytest.fixture
async def service(make_service: ServiceFactory, tmp_path: Path) -> Service:
    return await make_service(model_config(tmp_path, TEMPLATE))


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "think=unset unset effort=unset"),
        ({"enable_thinking": False}, "think=False False effort=unset"),
        ({"enable_thinking": True}, "think=True True effort=unset"),
        ({"thinking": {"type": "disabled"}}, "think=False False effort=unset"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "think=True True effort=unset"),
        ({"thinking": {"type": "adaptive"}}, "think=unset unset effort=unset"),
        ({"thinking": False}, "think=False False effort=unset"),
        ({"reasoning": {"effort": "low", "exclude": False}}, "think=unset unset effort=low"),
        ({"reasoning": {"enabled": False}}, "think=False False effort=unset"),
        ({"reasoning": {"effort": "none"}}, "think=False False effort=none"),
        ({"reasoning": True}, "think=unset unset effort=unset"),
        ({"reasoning_effort": "none"}, "think=False False effort=none"),
        ({"reasoning_effort": "high", "enable_thinking": True}, "think=True True effort=high"),
        ({"enable_thinking": False, "thinking": {"type": "disabled"}}, "think=False False effort=unset"),
        (
            {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}},
            "think=True False effort=unset",
        ),
    ],
)
async def test_the_template_is_told(service: Service, fields: dict, prompt: str):
    assert await told(service, **fields) == prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": True, "thinking": {"type": "disabled"}},
        {"reasoning_effort": "none", "enable_thinking": True},
        {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
    ],
)
async def test_what_contradicts_itself_is_refused(service: Service, fields: dict):
    answer = await service.post("/v1/chat/completions", messages=HI, **fields)
    assert answer.status_code == 400
    assert "give one of them" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("kind", "is_on"), [("enabled", True), ("adaptive", None), ("disabled", False)])
def test_messages_turn_it_on_and_off(kind: str, is_on: bool | None):
    body = {"model": "demo", "max_tokens": 5, "messages": HI, "thinking": {"type": kind, "budget_tokens": 2000}}
    variables = MessagesRequest.model_validate(body).to_chat().thinking_variables()
    assert variables.get("enable_thinking") is is_on


async def test_responses_know_every_effort_of_chats(service: Service):
    for effort in ("none", "xhigh", "max"):
        answer = await service.post("/v1/responses", input="hi", reasoning={"effort": effort}, max_output_tokens=1)
        assert answer.status_code == 200, answer.text
