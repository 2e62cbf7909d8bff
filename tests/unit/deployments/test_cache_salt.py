"""Whose prompts are cached together: no two keys, and no two salts of one."""

import hashlib

from hypothesis import given, strategies as st
from in_process import Service, ServiceFactory, emulated_config, eventually

from deployments.accounts_config import KeyLimits
from deployments.router.cache_salt import salt_of
from deployments.router.keys import ApiKey
from llm.serving.schemas import GenerationRequest

NAMES = st.text(alphabet="a/\0:é", max_size=6) | st.text(max_size=12)


@given(first=st.tuples(NAMES, NAMES), second=st.tuples(NAMES, NAMES))
def test_different_keys_and_salts_never_meet(first: tuple[str, str], second: tuple[str, str]):
    assert (salt_of(*first) == salt_of(*second)) == (first == second)


@given(tenant=NAMES, salt=NAMES, cut=st.integers(0, 12))
def test_moving_text_between_key_and_salt_changes_the_salt(tenant: str, salt: str, cut: int):
    text = tenant + salt
    moved = text[:cut], text[cut:]
    assert (salt_of(tenant, salt) == salt_of(*moved)) == (moved == (tenant, salt))


@given(tenant=NAMES, salt=NAMES)
def test_no_client_can_bring_the_salt_of_others(tenant: str, salt: str):
    if tenant or salt:
        assert salt_of("", salt_of(tenant, salt)) != salt_of(tenant, salt)
        assert salt_of(tenant, salt) != ""


async def test_a_salt_does_not_reach_into_another_keys_cache(make_service: ServiceFactory):
    keys = tuple(ApiKey(name, hashlib.sha256(name.encode()).digest(), KeyLimits()) for name in ("team", "team/a"))
    service = await make_service(emulated_config(prefix_cache_per_key=True), keys=keys)

    async def cached(secret: str, **fields: str) -> int:
        body = {"model": "demo", "prompt": [97] * 64, "max_tokens": 1, **fields}
        answer = await service.http.post("/v1/completions", json=body, headers={"x-api-key": secret})
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [await cached("team/a"), await cached("team/a")] == [0, 48]
    assert await cached("team", cache_salt="a/") == 0
    assert await cached("team") == 0
    assert await cached("team", cache_salt="team/a/") == 0
    assert await cached("team", cache_salt="a/") == 48


async def test_a_salt_is_no_other_salt_without_keys_either(make_service: ServiceFactory):
    service: Service = await make_service()

    async def cached(**fields: str) -> int:
        answer = await service.post("/v1/completions", prompt=[97] * 64, max_tokens=1, **fields)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert await cached(cache_salt="mine") == 0
    assert await cached(cache_salt=salt_of("", "mine")) == 0
    assert await cached() == 0
    assert await cached(cache_salt="mine") == 48


async def test_a_request_without_a_salt_goes_on_as_it_is(make_service: ServiceFactory):
    """A request for many answers is not copied for each of them."""
    service = await make_service()
    requests = [GenerationRequest(prompt_token_ids=(1, 2, 3), max_new_tokens=1) for _ in range(3)]
    group = await service.router.start(requests)
    assert all(generation.request is request for generation, request in zip(group.generations, requests, strict=True))
    salted = await service.router.start([requests[0].model_copy(update={"cache_salt": "mine", "request_id": "other"})])
    assert salted.generations[0].request.cache_salt == salt_of("", "mine")
    await eventually(lambda: all(g.is_over for g in (*group.generations, *salted.generations)))
