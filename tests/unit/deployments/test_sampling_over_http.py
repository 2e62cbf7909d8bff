"""What the fields of a request do to its answer, and what a stream consists of, with the demo model."""

import pytest
from in_process import DEMO, Service, ServiceFactory
from scripted_engine import events_of

from deployments.config import AppConfig

PROMPT = "17 + 25 ="
GREEDY = {"temperature": 0}
FREE = {"temperature": 1.8, "ignore_eos": True, "max_tokens": 24}
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture
async def demo(make_service: ServiceFactory) -> Service:
    """The demo model itself."""
    return await make_service(AppConfig.model_validate({"model": str(DEMO), "engine": {"max_batch_size": 16}}))


async def complete(service: Service, **fields) -> dict:
    response = await service.post("/v1/completions", **{"prompt": PROMPT, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


async def id_of(service: Service, text: str) -> int:
    (token_id,) = (await service.post("/tokenize", prompt=text, add_special_tokens=False)).json()["tokens"]
    return token_id


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
async def test_one_token_left_is_the_greedy_one(demo: Service, narrow: dict):
    greedy = await complete(demo, **{**FREE, **GREEDY})
    wide = {(await complete(demo, **FREE, seed=seed))["text"] for seed in range(4)}
    assert wide != {greedy["text"]}, "without the limit something else is drawn"
    for seed in range(4):
        assert (await complete(demo, **FREE, **narrow, seed=seed))["text"] == greedy["text"]


async def test_a_seed_repeats_an_answer(demo: Service):
    texts = [(await complete(demo, **FREE, seed=seed))["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


async def test_logit_bias_forces_and_forbids(demo: Service):
    x = await id_of(demo, "x")
    assert (await complete(demo, **GREEDY, logit_bias={str(x): 100}, max_tokens=5))["text"] == "xxxxx"
    first = (await complete(demo, **GREEDY, max_tokens=1, logprobs=0))["logprobs"]["tokens"][0]
    banned = {str(await id_of(demo, first)): -100}
    assert not (await complete(demo, **GREEDY, logit_bias=banned, max_tokens=1))["text"].startswith(first)


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 5.0}]
)
async def test_penalties_are_against_repetition(demo: Service, penalty: dict):
    """With nothing but letters allowed, more of them are different."""
    bias = {str(await id_of(demo, letter)): 100 for letter in "abcdefghijklmnopqrstuvwxyz"}
    fields = {**GREEDY, "logit_bias": bias, "max_tokens": 24}
    plain = (await complete(demo, **fields))["text"]
    other = (await complete(demo, **fields, **penalty))["text"]
    assert len(plain) == len(other) == 24
    assert len(set(other)) > len(set(plain))


async def test_where_an_answer_ends(demo: Service):
    async def chat(**fields) -> tuple[str, str]:
        response = await demo.post("/v1/chat/completions", messages=MESSAGES, **GREEDY, **fields)
        (choice,) = response.json()["choices"]
        return choice["message"]["content"], choice["finish_reason"]

    assert await chat() == ("42", "stop")
    longer, _ = await chat(min_tokens=10, max_tokens=40)
    assert len(longer) > 2
    assert (await chat(ignore_eos=True, max_tokens=12))[1] == "length"
    assert await chat(max_tokens=1) == ("4", "length")
    assert await chat(stop_token_ids=[await id_of(demo, "2")]) == ("4", "stop")
    for stop in ("2", ["2", "never"]):
        assert await chat(stop=stop) == ("4", "stop")


async def test_both_names_of_the_limit(demo: Service):
    for name in ("max_tokens", "max_completion_tokens"):
        response = await demo.post("/v1/chat/completions", messages=MESSAGES, **{name: 1})
        assert response.json()["usage"]["completion_tokens"] == 1


async def test_what_a_stream_consists_of(demo: Service):
    """Role first, one finish reason for each choice, token counts last, the same head and `logprobs` throughout."""
    response = await demo.post(
        "/v1/chat/completions", messages=MESSAGES, stream=True, n=2, stream_options={"include_usage": True}
    )
    *chunks, last = events_of(response.text)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, last]}) == 1
    for index in range(2):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert all(choice["logprobs"] is None for choice in choices)
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "42"


async def test_log_probabilities(demo: Service):
    response = await demo.post("/v1/chat/completions", messages=MESSAGES, logprobs=True, top_logprobs=2, temperature=0)
    entries = response.json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["4", "2"]
    for entry in entries:
        assert entry["token"] == entry["top_logprobs"][0]["token"], "greedy"
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert 0 >= entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
