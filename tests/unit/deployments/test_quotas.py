"""Limits that several routers share, over HTTP without a socket; and the accountant away, slow, or new."""

import asyncio
import hashlib

import pytest
from in_process import Service, ServiceFactory, emulated_config

from deployments.accounts_config import KeyLimits
from deployments.config import AwayPolicy
from deployments.errors import AccountantAwayError
from deployments.router.access import Access
from deployments.router.accountant import Accountant
from deployments.router.keys import ApiKey, KeySource
from deployments.router.leases import Ask, Reply
from deployments.router.quotas import OwnAccountant, Quotas

SECRET = "sk-secret"


class SharedAccountant:
    """One accountant for several routers of this process, which can be away, or be started anew."""

    is_shared = True

    def __init__(self, num_routers: int) -> None:
        self.num_routers = num_routers
        self.is_away = False
        self.num_exchanges = 0
        self.restart()

    def restart(self) -> None:
        self.accountant = Accountant(self.num_routers)

    async def exchange(self, ask: Ask) -> Reply:
        self.num_exchanges += 1
        await asyncio.sleep(0.002)  # as a call between processes
        if self.is_away:
            raise AccountantAwayError("switched off")
        return self.accountant.exchange(ask)


def team(**limits: int) -> ApiKey:
    return ApiKey("team", hashlib.sha256(SECRET.encode()).digest(), KeyLimits(**limits))


async def routers(
    make_service: ServiceFactory, shared: SharedAccountant, key: ApiKey, when_away: AwayPolicy = AwayPolicy.OPEN
) -> list[Service]:
    config = emulated_config(emulation={"tokens_per_s": 50.0, "max_seq_len": 2048})
    return [
        await make_service(config, access=Access(KeySource((key,)), shared, when_away))
        for _ in range(shared.num_routers)
    ]


async def ask(service: Service, **fields):
    body = {"model": "demo", "prompt": "a", "max_tokens": 1, "ignore_eos": True, **fields}
    return await service.http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {SECRET}"})


async def statuses(*asking) -> list[int]:
    return [response.status_code for response in await asyncio.gather(*asking)]


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_four_routers_admit_as_many_as_one(make_service: ServiceFactory):
    services = await routers(make_service, SharedAccountant(4), team(requests_per_min=10))
    got = await statuses(*[ask(service) for service in services for _ in range(5)])
    assert sorted(got) == [200] * 10 + [429] * 10
    refused = await ask(services[0])
    assert refused.json()["error"]["type"] == "requests"
    assert 1 <= int(refused.headers["retry-after"]) <= 6
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"


async def test_remaining_is_what_all_routers_have_left(make_service: ServiceFactory):
    services = await routers(make_service, SharedAccountant(2), team(requests_per_min=10))
    remaining = [int((await ask(services[i % 2])).headers["x-ratelimit-remaining-requests"]) for i in range(6)]
    assert remaining == [9, 8, 7, 6, 5, 4]


async def test_one_open_request_over_four_routers(make_service: ServiceFactory):
    services = await routers(make_service, SharedAccountant(4), team(max_concurrent_requests=1))
    long = asyncio.ensure_future(ask(services[0], max_tokens=50))
    await until(lambda: services[0].router.journal.num_live == 1)
    refused = await asyncio.gather(*[ask(service) for service in services])
    assert [(r.status_code, r.json()["error"]["type"]) for r in refused] == [(429, "concurrency")] * 4
    assert (await long).status_code == 200
    for service in services:
        assert (await ask(service)).status_code == 200, "one after the other, the next right after the last"


async def test_two_open_requests_may_be_with_one_router(make_service: ServiceFactory):
    services = await routers(make_service, SharedAccountant(2), team(max_concurrent_requests=2))
    assert await statuses(ask(services[0], max_tokens=10), ask(services[0], max_tokens=10)) == [200, 200]


async def test_tokens_are_counted_together(make_service: ServiceFactory):
    services = await routers(make_service, SharedAccountant(2), team(tokens_per_min=20))
    first = await ask(services[0], prompt=[97] * 10, max_tokens=8)
    assert first.headers["x-ratelimit-remaining-tokens"] == "2"
    await until(lambda: not services[0].directory.access.account(team())._tokens.in_hand)
    assert (await ask(services[1], prompt=[97] * 10)).status_code == 200, "a request may start while any are left"
    await until(lambda: not services[1].directory.access.account(team())._tokens.in_hand)
    assert (await ask(services[0])).json()["error"]["type"] == "tokens"


@pytest.mark.parametrize(("when_away", "expected"), [(AwayPolicy.OPEN, 200), (AwayPolicy.CLOSED, 503)])
async def test_without_the_accountant(make_service: ServiceFactory, when_away: AwayPolicy, expected: int, serve_log):
    shared = SharedAccountant(2)
    services = await routers(make_service, shared, team(requests_per_min=3), when_away)
    assert (await ask(services[0])).status_code == 200
    shared.is_away = True
    answer = await ask(services[0])
    assert answer.status_code == expected
    if when_away is AwayPolicy.CLOSED:
        assert answer.json()["error"]["code"] == "limits_unavailable"
        assert answer.headers["retry-after"] == "2"
    else:
        assert await statuses(ask(services[0]), ask(services[0])) == [200, 429], "each router counts alone"
    await until(lambda: all(s.directory.access.snapshot()["is_accountant_away"] for s in services))
    assert sum("is away" in record.getMessage() for record in serve_log) == 2, "told once by each router"
    shared.is_away = False
    await until(lambda: not any(s.directory.access.snapshot()["is_accountant_away"] for s in services))
    left = 3 - (3 if when_away is AwayPolicy.OPEN else 1)
    got = await statuses(*[ask(service) for service in services for _ in range(2)])
    assert got.count(200) == left, "what was used meanwhile counts"


async def test_an_accountant_that_does_not_answer_is_away(make_service: ServiceFactory, monkeypatch):
    monkeypatch.setattr("deployments.router.quotas._TIMEOUT_S", 0.05)
    shared = SharedAccountant(2)
    services = await routers(make_service, shared, team(requests_per_min=3))
    await until(lambda: shared.num_exchanges >= 4)
    monkeypatch.setattr(shared, "exchange", lambda ask: asyncio.Event().wait())
    assert (await ask(services[0])).status_code == 200
    assert services[0].directory.access.snapshot()["is_accountant_away"]


async def test_a_new_accountant_counts_on(make_service: ServiceFactory):
    shared = SharedAccountant(2)
    services = await routers(make_service, shared, team(requests_per_min=6, max_concurrent_requests=2))
    assert await statuses(*[ask(services[0]) for _ in range(2)]) == [200, 200]
    long = [asyncio.ensure_future(ask(service, max_tokens=200)) for service in services]
    await until(lambda: all(service.router.journal.num_live for service in services))
    shared.restart()
    refused = await asyncio.gather(*[ask(service) for service in services])
    assert [r.json()["error"]["type"] for r in refused] == ["concurrency"] * 2
    for task in long:
        task.cancel()
    await asyncio.gather(*long, return_exceptions=True)
    await until(lambda: not any(s.directory.access.account(team()).num_open for s in services))
    num_in = 0
    for _ in range(8):
        num_in += (await statuses(ask(services[1]))).count(200)
    assert num_in == 2, "four of six were used before"


async def test_clients_that_leave_while_they_wait_hold_nothing():
    shared = SharedAccountant(1)
    quotas = Quotas(shared)
    account = quotas.account(team(max_concurrent_requests=1))
    assert await quotas.enter(account) is None
    account.leave()
    for delay_s in (0.0, 0.001, 0.002, 0.003, 0.004, 0.005):
        entering = asyncio.ensure_future(quotas.enter(account))
        await asyncio.sleep(delay_s)
        entering.cancel()
        if not (await asyncio.gather(entering, return_exceptions=True))[0]:
            account.leave()
        assert account.num_open == 0
        assert await asyncio.wait_for(quotas.enter(account), 5) is None
        account.leave()
    quotas.close()


async def test_a_client_let_in_at_the_moment_it_leaves_holds_nothing():
    """The exchange answers and the client leaves in the same turn of the event loop."""
    quotas = Quotas(OwnAccountant())
    account = quotas.account(team(max_concurrent_requests=1))
    try_enter = account.try_enter

    def try_enter_and_leave() -> bool:
        is_in = try_enter()
        if is_in:  # runs before the waiting task hears of it
            asyncio.get_running_loop().call_soon(entering.cancel)
        return is_in

    account.try_enter = try_enter_and_leave
    entering = asyncio.ensure_future(quotas.enter(account))
    assert isinstance((await asyncio.gather(entering, return_exceptions=True))[0], asyncio.CancelledError)
    assert (account.num_open, account._num_entered) == (0, 1)
    quotas.close()


async def test_a_hammering_client_does_not_reach_the_accountant():
    shared = SharedAccountant(1)
    quotas = Quotas(shared)
    account = quotas.account(team(requests_per_min=1))
    assert await quotas.enter(account) is None
    refused = await quotas.enter(account)
    num_before = shared.num_exchanges
    refusals = [await quotas.enter(account) for _ in range(200)]
    assert refused is not None
    assert all(refusals)
    assert shared.num_exchanges - num_before <= 20
    quotas.close()


async def test_keys_without_limits_ask_nobody():
    shared = SharedAccountant(2)
    quotas = Quotas(shared)
    account = quotas.account(team())
    assert [await quotas.enter(account) for _ in range(100)] == [None] * 100
    assert shared.num_exchanges == 0


async def test_a_permit_whose_release_is_on_its_way_is_found():
    """A client has an answer from one router and asks another one before the first has told the accountant."""
    accountant, release_may_go, key = Accountant(2), asyncio.Event(), team(max_concurrent_requests=1)

    class First(SharedAccountant):
        async def exchange(self, ask: Ask) -> Reply:
            await release_may_go.wait()
            return accountant.exchange(ask)

    class Second(SharedAccountant):
        async def exchange(self, ask: Ask) -> Reply:
            reply = accountant.exchange(ask)
            if any(claim.num_waiting for claim in ask.claims) and reply.grants:
                release_may_go.set()
            return reply

    first, second = Quotas(First(2)), Quotas(Second(2))
    release_may_go.set()
    second.start()
    assert await first.enter(first.account(key)) is None
    release_may_go.clear()
    first.account(key).leave()
    assert await second.enter(second.account(key)) is None
    first.close()
    second.close()


async def test_a_release_that_got_lost_is_told_again():
    accountant, key = Accountant(2), team(max_concurrent_requests=1)

    class Client(SharedAccountant):
        async def exchange(self, ask: Ask) -> Reply:
            if self.is_away:
                raise AccountantAwayError("switched off")
            return accountant.exchange(ask)

    clients = Client(2), Client(2)
    first, second = Quotas(clients[0]), Quotas(clients[1])
    second.start()
    assert await first.enter(first.account(key)) is None
    clients[0].is_away = True
    first.account(key).leave()
    await until(lambda: first.is_away)
    clients[0].is_away = False
    async with asyncio.timeout(5):
        while await second.enter(second.account(key)) is not None:
            await asyncio.sleep(0.01)
    first.close()
    second.close()
