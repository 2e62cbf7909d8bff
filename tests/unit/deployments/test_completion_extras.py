"""`echo` and `best_of` of plain completions."""

import pytest
from in_process import DEMO, Service, ServiceFactory
from scripted_engine import events_of

from deployments.api.openai.responses import Completion
from deployments.config import AppConfig

PROMPTS = ["17 + 25 =", "3 + 4 ="]


@pytest.fixture
async def demo(make_service: ServiceFactory) -> Service:
    """The demo model itself."""
    return await make_service(AppConfig.model_validate({"model": str(DEMO), "engine": {"max_batch_size": 16}}))


async def complete(service: Service, **fields) -> dict:
    response = await service.post("/v1/completions", **{"max_tokens": 8, **fields})
    assert response.status_code == 200, response.text
    Completion.model_validate_json(response.content, strict=True)
    return response.json()


def texts(answer: dict) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


async def test_echo_puts_the_prompt_in_front(demo: Service):
    plain = await complete(demo, prompt=PROMPTS, n=2, seed=1, temperature=1)
    echoed = await complete(demo, prompt=PROMPTS, n=2, seed=1, temperature=1, echo=True)
    wanted = [PROMPTS[i // 2] + text for i, text in enumerate(texts(plain))]
    assert texts(echoed) == wanted
    assert echoed["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    stream = await demo.post("/v1/completions", prompt=PROMPTS, n=2, seed=1, temperature=1, echo=True, max_tokens=8,
                             stream=True)  # fmt: skip
    streamed = [""] * 4
    for chunk in events_of(stream.text):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == wanted
    ids = (await demo.post("/tokenize", prompt=PROMPTS[0])).json()["tokens"]
    (from_ids,) = texts(await complete(demo, prompt=ids, temperature=0, echo=True))
    (from_text,) = texts(await complete(demo, prompt=PROMPTS[0], temperature=0, echo=True))
    assert from_ids == from_text


async def test_best_of_gives_the_likeliest(demo: Service):
    """Those of all answers with the highest mean log probability of a token, the best one first, for each prompt."""
    # No end token, whose probability counts but is not shown.
    fields = {"prompt": PROMPTS, "seed": 3, "temperature": 1.5, "ignore_eos": True, "min_tokens": 8}

    def mean(choice: dict) -> float:
        logprobs = choice["logprobs"]["token_logprobs"]
        return sum(logprobs) / len(logprobs)

    every = await complete(demo, **fields, n=5, logprobs=0)
    best = await complete(demo, **fields, n=2, best_of=5, logprobs=0)
    are_first = []
    for i in range(2):
        answers, given = every["choices"][5 * i : 5 * i + 5], best["choices"][2 * i : 2 * i + 2]
        ranked = sorted(answers, key=mean, reverse=True)
        assert [choice["text"] for choice in given] == [choice["text"] for choice in ranked[:2]]
        are_first.append(ranked[:2] == answers[:2])
    assert not all(are_first)
    assert best["usage"] == every["usage"], "all that were made count"
    without = await complete(demo, **fields, n=2, best_of=5)
    assert texts(without) == texts(best)
    assert all(choice["logprobs"] is None for choice in without["choices"])
