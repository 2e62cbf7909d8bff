"""Which requests of one HTTP request wait for another's prompt."""

from deployments.router.prompts import leaders
from llm.serving.schemas import GenerationRequest

LONG = tuple(range(600))


def vector(*ids: int, pooling: str | None = None) -> GenerationRequest:
    if pooling is not None:
        return GenerationRequest(prompt_token_ids=ids, pooling=pooling)
    return GenerationRequest(prompt_token_ids=ids, scores_allowed=True, allowed_token_ids=(1, 2), max_new_tokens=0)


def tokens(*ids: int) -> GenerationRequest:
    return GenerationRequest(prompt_token_ids=ids)


def test_equal_prompts_follow_the_first():
    assert leaders([tokens(*LONG), tokens(1, 2), tokens(*LONG)], 32) == {2: 0}
    assert leaders([tokens(1, 2), tokens(1, 2)], 32) == {}, "too short"


def test_documents_follow_the_first_with_their_query():
    """If it is long, or they are many; and a document that is there twice follows itself."""
    assert leaders([vector(*LONG, i) for i in range(9)], 32) == dict.fromkeys(range(1, 9), 0)
    assert leaders([vector(*LONG, i) for i in range(4)], 32) == {}
    assert leaders([vector(*LONG[:50], i) for i in range(100)], 32) == dict.fromkeys(range(1, 100), 0)
    twice = [vector(*LONG, i) for i in (0, 1, 2, 3, 1, 4, 5, 6, 7)]
    assert leaders(twice, 32) == {**dict.fromkeys(range(1, 9), 0), 4: 1}


def test_what_shares_nothing_waits_for_nobody():
    apart = [vector(i, *LONG) for i in range(100)]
    assert leaders(apart, 32) == {}
    assert leaders([*[vector(*LONG, i) for i in range(50)], vector(5, *LONG)], 32) == {}
    assert leaders([vector(*LONG, i, pooling="mean") for i in range(50)], 32) == {}, "every token's state is needed"
    assert leaders([vector(*LONG, i, pooling="last") for i in range(50)], 32) == dict.fromkeys(range(1, 50), 0)
    assert leaders([tokens(*LONG, i) for i in range(50)], 32) == {}
    assert leaders([vector(*LONG)], 32) == leaders([], 32) == {}
