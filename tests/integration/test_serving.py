"""The whole path, through the `openai` client as its users have it."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from live_server import HTTP2_OFFER, Server, replica_pids

MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.fixture(autouse=True)
def healthy_afterwards(server: Server):
    yield
    server.check_healthy()


def long_stream(server: Server, prompt: str = "Once upon a time", max_tokens: int = 600, **options):
    return server.openai.completions.create(
        model="demo", prompt=prompt, max_tokens=max_tokens, stream=True, extra_body={"ignore_eos": True}, **options
    )


def collect(stream) -> str:
    return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)


def test_chat_answers_and_counts(server: Server):
    answer = server.openai.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == "42"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = server.openai.chat.completions.create(model="demo", messages=MESSAGES, n=4)
    assert [choice.message.content for choice in again.choices] == ["42"] * 4
    assert again.usage.prompt_tokens_details.cached_tokens > 0, "the prefix cache has this prompt"


def test_chat_streams(server: Server):
    chunks = list(
        server.openai.chat.completions.create(
            model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "42"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 3


def test_same_seed_same_text_whatever_runs_beside_it(server: Server):
    def draw(seed: int, n: int = 1):
        answer = server.openai.completions.create(
            model="demo", prompt="tell", max_tokens=40, temperature=1.5, seed=seed, n=n, extra_body={"ignore_eos": True}
        )
        return [choice.text for choice in answer.choices]

    alone = draw(5, n=3)
    assert len(set(alone)) == 3
    assert draw(6) == alone[1:2], "the i-th choice has seed + i"
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda i: draw(5 + i % 2), range(8)))
    assert crowd == [alone[i % 2 : i % 2 + 1] for i in range(8)]


def test_stop_strings_and_log_probabilities(server: Server):
    answer = server.openai.chat.completions.create(
        model="demo", messages=MESSAGES, stop=["2"], logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].message.content == "4"
    assert answer.choices[0].finish_reason == "stop"
    first = answer.choices[0].logprobs.content[0]
    assert first.token == first.top_logprobs[0].token == "4"
    assert len(first.top_logprobs) == 3
    plain = server.openai.completions.create(model="demo", prompt="a", max_tokens=3, logprobs=2)
    assert len(plain.choices[0].logprobs.tokens) == plain.usage.completion_tokens - (
        plain.choices[0].finish_reason == "stop"
    )


def test_prompts_of_every_form(server: Server):
    ids = server.http.post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
    texts = [
        server.openai.completions.create(model="demo", prompt=prompt, max_tokens=5, temperature=0).choices
        for prompt in ("abc", ["abc", "abc"], ids, [ids, ids])
    ]
    assert len({choice.text for choices in texts for choice in choices}) == 1
    assert [len(choices) for choices in texts] == [1, 2, 1, 2]


def test_errors_become_the_clients_exceptions(server: Server):
    with pytest.raises(openai.NotFoundError) as not_found:
        server.openai.chat.completions.create(model="other", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        server.openai.chat.completions.create(model="demo", messages=MESSAGES, temperature=5)
    assert bad.value.param == "temperature"
    assert [model.id for model in server.openai.models.list()] == ["demo"]
    assert server.openai.models.retrieve("demo").id == "demo"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server: Server, is_stream: bool):
    resumed_before, generated_before = server.stats()["router"]["num_resumes"], server.num_generated_tokens()
    if is_stream:
        stream = long_stream(server, max_tokens=2000)
        next(iter(stream))
        server.wait_for(lambda: server.num_used_pages() > 0)
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            server.openai.completions.create(
                model="demo", prompt="a", max_tokens=2000, timeout=0.5, extra_body={"ignore_eos": True}
            )
    server.wait_for(lambda: server.num_used_pages() == 0)
    assert server.num_generated_tokens() - generated_before < 1900, "it was generated to its end"
    assert server.stats()["router"]["num_resumes"] == resumed_before, "a client that leaves is no lost replica"


def test_two_replicas_share_load(server: Server):
    def generated() -> dict[str, int]:
        return {name: replica["num_generated_tokens"] for name, replica in server.stats()["replicas"].items()}

    before = generated()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: collect(long_stream(server, max_tokens=150)), range(8)))
    assert len(set(texts)) == 1
    server.wait_for(lambda: sum(generated().values()) - sum(before.values()) >= 8 * 150)
    shares = [generated()[name] - before.get(name, 0) for name in generated()]
    assert min(shares) >= 0.2 * sum(shares)


def test_a_killed_replica_loses_nothing(server: Server):
    """Its streams go on in the other one with the text that they would have had."""
    expected = collect(long_stream(server))
    resumed_before = server.stats()["router"]["num_resumes"]
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(lambda: collect(long_stream(server))) for _ in range(6)]
        server.wait_for(lambda: server.stats()["router"]["num_live"] == 6)
        server.wait_for(lambda: len(busy(server)) == 2, what="both replicas should be at work")
        time.sleep(0.2)
        os.kill(replica_pids()[0], signal.SIGKILL)
        assert [stream.result() for stream in streams] == [expected] * 6
    assert server.stats()["router"]["num_resumes"] > resumed_before
    server.wait_for(lambda: len(replica_pids()) == 2, 60, "the replica was not replaced")


def busy(server: Server) -> list[str]:
    return [name for name, replica in server.stats()["replicas"].items() if replica["num_running"]]


@pytest.mark.parametrize("path", ["/v1/completions", "//v1//completions/"])
def test_javas_offer_of_http2_and_careless_paths(server: Server, path: str):
    completion = {"model": "demo", "prompt": "a", "max_tokens": 2}
    for _ in range(2):
        answer = server.http.post(f"{server.url}{path}", json=completion, headers=HTTP2_OFFER)
        assert answer.status_code == 200, answer.text
    stream = {**completion, "stream": True}
    assert server.http.post(f"{server.url}{path}", json=stream, headers=HTTP2_OFFER).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/docs"])
def test_head_is_answered_without_a_body(server: Server, path: str):
    head = server.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert server.http.get("/health").json() == {"status": "ok"}, "the connection goes on"
