"""Other people's clients against the running server, each of their features once."""

import json
import re
from typing import Literal

import anthropic
import litellm
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI as LangChainCompletion
from live_server import Server
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


class Weather(BaseModel, extra="forbid"):
    """Weather of a place."""

    sunny: bool
    place: Literal["Paris", "Rome"]
    wind: bool


@pytest.fixture(autouse=True)
def healthy_afterwards(server: Server):
    yield
    server.check_healthy()


def check_arguments(text: str) -> None:
    arguments = json.loads(text)
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9


def test_openai_tools(server: Server):
    answer = server.openai.chat.completions.create(
        model="demo", messages=QUESTION, tools=[TOOL], tool_choice=NAMED, max_tokens=200
    )
    (call,) = answer.choices[0].message.tool_calls
    check_arguments(call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"
    with server.openai.chat.completions.stream(
        model="demo", messages=QUESTION, tools=[TOOL], tool_choice=NAMED, max_tokens=200
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    check_arguments(final.choices[0].message.tool_calls[0].function.arguments)


def test_openai_structured_output(server: Server):
    parsed = server.openai.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Weather, max_tokens=500, temperature=0,
        extra_body={"stop": None}, seed=1,
    ).choices[0].message.parsed  # fmt: skip
    assert isinstance(parsed, Weather)
    guided = server.openai.chat.completions.create(
        model="demo", messages=QUESTION, extra_body={"guided_regex": "[0-9]{2}"}, temperature=0
    )
    assert guided.choices[0].message.content == "42"


def test_openai_responses(server: Server):
    response = server.openai.responses.create(model="demo", input="What is 17 + 25?", temperature=0)
    assert (response.output_text, response.status) == ("42", "completed")
    with server.openai.responses.stream(model="demo", input="What is 17 + 25?", temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert (text, stream.get_final_response().output_text) == ("42", "42")
    tool = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
    called = server.openai.responses.create(
        model="demo", input="hi", tools=[tool], tool_choice={"type": "function", "name": "get_weather"}
    )
    check_arguments(called.output[0].arguments)


def test_openai_responses_that_are_stored(server: Server):
    """Every method of the client for them; the tokens that the model is told tell whether the conversation went on."""
    responses = server.openai.responses
    first = responses.create(model="demo", input="What is 17 + 25?", temperature=0)
    second = responses.create(model="demo", input="And 2 + 2?", previous_response_id=first.id, temperature=0)
    said = [item.model_dump() for item in first.output]
    history = [{"role": "user", "content": "What is 17 + 25?"}, *said, {"role": "user", "content": "And 2 + 2?"}]
    assert second.usage.input_tokens == responses.create(model="demo", input=history).usage.input_tokens
    assert responses.retrieve(second.id).output_text == second.output_text
    items = list(responses.input_items.list(second.id, order="asc", limit=2))
    assert [item.content[0].text for item in items] == ["What is 17 + 25?", "42", "And 2 + 2?"]
    responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match=first.id):
        responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match=first.id):
        responses.create(model="demo", input="And?", previous_response_id=first.id)


def test_openai_embeddings(server: Server):
    answer = server.openai.embeddings.create(model="demo", input=["seventeen", "42"])
    assert [len(entry.embedding) for entry in answer.data] == [256, 256]
    assert sum(x * x for x in answer.data[0].embedding) == pytest.approx(1, abs=1e-4)


def test_documents_are_ranked_and_pairs_scored(server: Server):
    """By cosines here; what is most like the query is the query itself."""
    body = {"model": "demo", "query": "seventeen", "documents": ["12 + 30", "seventeen", {"text": "What is 17 + 25?"}]}
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = server.http.post(path, json={**body, "top_n": 2}).json()
        best, second = answer["results"]
        assert (best["index"], best["document"]) == (1, {"text": "seventeen"})
        assert best["relevance_score"] == pytest.approx(1, abs=1e-5)
        assert second["relevance_score"] < 1
    scores = server.http.post("/v1/score", json={"model": "demo", "text_1": "seventeen", "text_2": ["12 + 30", "17"]})
    assert [entry["index"] for entry in scores.json()["data"]] == [0, 1]


def test_many_embeddings_beside_a_stream(server: Server):
    """None of a request's inputs gets lost on its way to a replica, however they overtake each other."""
    client = server.openai.with_options(timeout=15)
    with client.chat.completions.create(
        model="demo", messages=QUESTION, stream=True, max_tokens=200, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
        answers = [client.embeddings.create(model="demo", input=[f"number {i}" for i in range(40)]) for _ in range(4)]
    assert [[entry.index for entry in answer.data] for answer in answers] == [list(range(40))] * 4


def test_anthropic_messages(server: Server):
    client = anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    greedy = {"temperature": 0}
    message = client.messages.create(model="demo", max_tokens=20, messages=QUESTION, extra_body=greedy)
    assert (message.content[0].text, message.stop_reason) == ("42", "end_turn")
    with client.messages.stream(model="demo", max_tokens=20, messages=QUESTION, extra_body=greedy) as stream:
        assert "".join(stream.text_stream) == "42"
        assert stream.get_final_message().usage.output_tokens == 3
    counted = client.messages.count_tokens(model="demo", messages=QUESTION)
    assert counted.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens
    called = client.messages.create(
        model="demo", max_tokens=200, messages=QUESTION, tools=[{"name": "get_weather", "input_schema": PARAMETERS}],
        tool_choice={"type": "tool", "name": "get_weather"},
    )  # fmt: skip
    assert called.stop_reason == "tool_use"
    check_arguments(json.dumps(called.content[0].input))
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="demo", max_tokens=0, messages=QUESTION)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=5, messages=QUESTION)


def test_litellm(server: Server):
    common = {"api_base": f"{server.url}/v1", "api_key": "unused", "temperature": 0}
    answer = litellm.completion(model="openai/demo", messages=QUESTION, **common)
    assert answer.choices[0].message.content == "42"
    chunks = list(litellm.completion(model="openai/demo", messages=QUESTION, stream=True, **common))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "42"
    called = litellm.completion(
        model="openai/demo", messages=QUESTION, tools=[TOOL], tool_choice=NAMED, max_tokens=200, **common
    )
    check_arguments(called.choices[0].message.tool_calls[0].function.arguments)
    through_messages = litellm.completion(
        model="anthropic/demo", messages=QUESTION, api_base=server.url, api_key="unused", max_tokens=20
    )
    assert re.search("[0-9]", through_messages.choices[0].message.content)


def test_langchain(server: Server):
    model = ChatOpenAI(model="demo", base_url=f"{server.url}/v1", api_key="unused", temperature=0, max_tokens=300)
    assert model.invoke([HumanMessage("What is 17 + 25?")]).content == "42"
    assert "".join(chunk.content for chunk in model.stream("What is 17 + 25?")) == "42"
    bound = model.bind_tools([TOOL], tool_choice="get_weather")
    answer = bound.invoke([SystemMessage("You add."), HumanMessage("hi")])
    check_arguments(json.dumps(answer.tool_calls[0]["args"]))
    assert isinstance(model.with_structured_output(Weather, method="json_schema").invoke("hi"), Weather)
    completion = LangChainCompletion(model="demo", base_url=f"{server.url}/v1", api_key="unused", max_tokens=5)
    assert isinstance(completion.invoke("17 + 25 ="), str)
    assert isinstance(answer, AIMessage)
    assert ToolMessage("x", tool_call_id="1").type == "tool"
