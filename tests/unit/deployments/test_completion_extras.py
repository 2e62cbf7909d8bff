"""What plain completions have beside text: `echo`, `best_of`, log probabilities of prompts."""

import pytest
import torch
from in_process import DEMO, Service, ServiceFactory
from scripted_engine import events_of, use_script

from deployments.api.openai.responses import Completion
from deployments.config import AppConfig
from llm.checkpoint.loading import load_decoder
from llm.models.decoder import DecoderModel

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


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return load_decoder(DEMO, device="cpu", dtype=torch.float32, progress=False).eval()


@torch.inference_mode()
def prompt_logprobs_of(model: DecoderModel, ids: list[int]) -> torch.Tensor:
    """(tokens - 1, vocab_size), by one pass over the whole prompt."""
    return model([ids])[0, :-1].log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_likelihoods_as_lm_eval_asks_for_them(demo: Service, model: DecoderModel, max_tokens: int):
    """lm-evaluation-harness' `local-completions` sends context and continuation as one prompt of ids, echoed with log
    probabilities, and reads those of the continuation and whether each of its tokens was the likeliest."""
    tokenized = [(await demo.post("/tokenize", prompt=prompt)).json()["tokens"] for prompt in (*PROMPTS, PROMPTS[0])]
    answer = await complete(
        demo, prompt=tokenized, temperature=0, max_tokens=max_tokens, logprobs=1, seed=1234, echo=True
    )
    assert answer["usage"]["completion_tokens"] == 3 * max_tokens
    for ids, choice in zip(tokenized, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        expected = prompt_logprobs_of(model, ids)
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(ids) + max_tokens
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        own = expected.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()
        assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-4)
        likeliest = [max(top.values()) for top in logprobs["top_logprobs"][1 : len(ids)]]
        assert likeliest == pytest.approx(expected.amax(-1).tolist(), abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
async def test_text_offset_is_a_place_in_the_text(
    make_service: ServiceFactory, monkeypatch: pytest.MonkeyPatch, stream: bool
):
    """In characters, of which a token may hold a part: the demo's first tokens are bytes."""
    use_script(monkeypatch, "né 日本.")
    service = await make_service()
    answer = await service.post("/v1/completions", prompt="é!", max_tokens=50, logprobs=1, stream=stream)
    chunks = events_of(answer.text) if stream else [answer.json()]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert "".join(choice["text"] for choice in choices) == "né 日本."
    offsets = [offset for choice in choices if choice["logprobs"] for offset in choice["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5]


async def test_text_offset_behind_an_echo(demo: Service):
    prompt = "né 日本 ="
    ids = (await demo.post("/tokenize", prompt=prompt)).json()["tokens"]
    for given in (prompt, ids):
        answer = await complete(demo, prompt=given, logprobs=0, echo=True, max_tokens=2, ignore_eos=True, min_tokens=2)
        (choice,) = answer["choices"]
        assert choice["text"].startswith(prompt)
        offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
        assert offsets[len(ids)] == len(prompt)
        assert tokens[tokens.index("n") + 3] == " "
        assert offsets[tokens.index("n") : tokens.index("n") + 5] == [0, 1, 1, 2, 3]


async def test_prompt_logprobs_by_themselves(demo: Service, model: DecoderModel):
    ids = (await demo.post("/tokenize", prompt=PROMPTS[0])).json()["tokens"]
    answer = await complete(demo, prompt=PROMPTS[0], temperature=0, prompt_logprobs=2)
    (choice,) = answer["choices"]
    (plain,) = (await complete(demo, prompt=PROMPTS[0], temperature=0))["choices"]
    assert choice["text"] == plain["text"]
    assert "prompt_logprobs" not in plain
    assert choice["logprobs"] is None
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for token_id, entries, row in zip(ids[1:], others, prompt_logprobs_of(model, ids), strict=True):
        assert entries[str(token_id)]["logprob"] == pytest.approx(row[token_id].item(), abs=1e-4)
        assert {entry["rank"] for entry in entries.values()} - {None} == {1, 2}
        best = min(entries, key=lambda key: entries[key]["rank"] or 99)
        assert int(best) == row.argmax()


async def test_nothing_is_generated_where_nothing_is_asked_for(demo: Service):
    answer = await complete(demo, prompt=PROMPTS, max_tokens=0, echo=True)
    assert texts(answer) == PROMPTS
    assert answer["usage"]["completion_tokens"] == 0
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"echo": True, "logprobs": 1, "stream": True}, "stream"), ({"prompt_logprobs": 1, "stream": True}, "stream"),
     ({"max_tokens": 0, "stream": True}, "max_tokens"), ({"max_tokens": 0, "n": 2}, "max_tokens"),
     ({"prompt_logprobs": 21}, "prompt_logprobs"), ({"max_tokens": -1}, "max_tokens"),
     ({"allowed_token_ids": []}, "allowed_token_ids"), ({"allowed_token_ids": [True]}, "allowed_token_ids"),
     ({"allowed_token_ids": [10**6]}, "allowed_token_ids")],
)  # fmt: skip
async def test_what_cannot_be_is_refused(demo: Service, fields: dict, param: str):
    response = await demo.post("/v1/completions", **{"prompt": PROMPTS[0], "max_tokens": 4, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_only_allowed_tokens_are_drawn(demo: Service):
    allowed = sorted({*(await demo.post("/tokenize", prompt="0123456789")).json()["tokens"]})
    (text,) = texts(await complete(demo, prompt="abc", temperature=2, max_tokens=20, allowed_token_ids=allowed))
    assert set(text) <= set("0123456789")
    assert len(set(text)) > 1
