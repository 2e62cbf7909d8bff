"""The routing simulator: its clock against arithmetic by hand, its traces, and what it says of the policies."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.routing_events import CALL_DELAY_S, Simulation
from benchmarks.routing_replica import ReplicaSpeed, SimulatedReplica, SimulatedRequest
from benchmarks.routing_sim import simulate
from benchmarks.routing_trace import BLOCK_TOKENS, TraceRequest, read_trace
from deployments.config import PolicyName

SPEED = ReplicaSpeed()


def conversations(num_conversations: int = 24, num_turns: int = 6) -> list[TraceRequest]:
    """Chats that begin with the same block and grow by eight blocks a turn, one turn every 20 seconds or so."""
    draw = random.Random(0)
    requests = []
    for conversation in range(num_conversations):
        arrival_s, blocks = draw.uniform(0, 60), [0]
        for _ in range(num_turns):
            blocks = [*blocks, *(1 + conversation * 1000 + len(blocks) + i for i in range(8))]
            num_tokens = len(blocks) * BLOCK_TOKENS + draw.randrange(BLOCK_TOKENS)
            requests.append(TraceRequest(arrival_s, num_tokens, draw.randint(1, 300), tuple(blocks)))
            arrival_s += draw.uniform(10, 30)
    return sorted(requests, key=lambda request: request.arrival_s)


def run_alone(replica: SimulatedReplica, request: TraceRequest) -> SimulatedRequest:
    """One request through an idle replica that gets nothing else."""
    simulated = SimulatedRequest(request, 0, 0)
    replica.add(simulated, 0.0)
    now = 0.0
    while replica.num_open:
        plan = replica.start(now)
        assert plan is not None
        now = plan.end_s
        replica.finish()
    return simulated


def test_a_request_alone_takes_what_the_speed_says():
    """10,000 tokens in steps of 8,192 and 1,808, then 99 steps of the weights and a context that grows."""
    done = run_alone(SimulatedReplica(SPEED), TraceRequest(0.0, 10_000, 100))
    prefill_s = 10_000 * SPEED.prefill_token_s + 10_000**2 / 2 * SPEED.prefill_pair_s
    decode_s = 99 * SPEED.weights_s + sum(10_001 + i for i in range(99)) * SPEED.decode_context_s
    assert done.first_token_s == pytest.approx(prefill_s)
    assert done.end_s - done.first_token_s == pytest.approx(decode_s)


def test_a_cached_prefix_takes_no_time():
    replica = SimulatedReplica(SPEED)
    request = TraceRequest(0.0, 4 * BLOCK_TOKENS, 1, (1, 2, 3, 4))
    run_alone(replica, request)
    again = run_alone(replica, request)
    assert again.num_cached_tokens == 3 * BLOCK_TOKENS  # the last token must run
    pairs = BLOCK_TOKENS * (3 * BLOCK_TOKENS + BLOCK_TOKENS / 2)
    assert again.first_token_s == pytest.approx(BLOCK_TOKENS * SPEED.prefill_token_s + pairs * SPEED.prefill_pair_s)


def test_decodes_end_where_they_would_if_every_step_were_simulated():
    """A newcomer cuts the steps under way short at a step's end, neither losing nor repeating one."""
    replica, first = SimulatedReplica(SPEED), SimulatedRequest(TraceRequest(0.0, 100, 50), 0, 0)
    replica.add(first, 0.0)
    now, num_newcomers = 0.0, 0
    while replica.num_open:
        plan = replica.start(now)
        assert plan is not None
        if num_newcomers < 10 and not plan.chunks:
            num_newcomers += 1
            replica.add(SimulatedRequest(TraceRequest(0.0, 1, 1), num_newcomers, 0), now + 1e-6)
            plan = replica.plan
            assert plan is not None
            assert plan.num_steps == 1
        now = plan.end_s
        replica.finish()
    assert replica.num_served == 11
    # 50 steps gave its tokens, 11 of them with a prompt to prefill: none takes longer than the weights' reading.
    context_s = sum(101 + i for i in range(49)) * SPEED.decode_context_s
    own_prefill_s = 100**2 / 2 * SPEED.prefill_pair_s
    others_s = 10 * 0.5 * SPEED.prefill_pair_s
    assert now == pytest.approx(50 * SPEED.weights_s + context_s + own_prefill_s + others_s)


@pytest.mark.parametrize("policy", PolicyName)
@pytest.mark.parametrize("num_routers", [1, 3])
def test_every_request_ends_and_gives_its_memory_back(policy, num_routers):
    trace = conversations()
    simulation = Simulation(trace, policy=policy, num_replicas=3, num_routers=num_routers, speed=SPEED, time_scale=0.1)
    simulation.run()
    assert sum(replica.num_served for replica in simulation.replicas) == len(trace)
    for replica in simulation.replicas:
        replica.pool.check()
        assert replica.pool.num_used == 0
    for request in simulation.requests:
        assert request.request.arrival_s * 0.1 + CALL_DELAY_S < request.first_token_s <= request.end_s
    computed = sum(replica.num_computed_tokens for replica in simulation.replicas)
    cached = sum(request.num_cached_tokens for request in simulation.requests)
    assert computed + cached == sum(request.num_prompt_tokens for request in trace)


def test_routing_by_cost_keeps_conversations_together_and_loads_level():
    trace = conversations()
    cost, two, turns = (simulate(trace, policy=policy, num_replicas=4, load=0.5) for policy in PolicyName)
    assert cost["hit_rate"] > 1.5 * max(two["hit_rate"], turns["hit_rate"])
    assert 1.5 * cost["ttft_mean"] < min(two["ttft_mean"], turns["ttft_mean"])
    assert cost["max_served"] <= 1.3


def test_a_request_larger_than_the_memory_is_refused():
    with pytest.raises(ValueError, match="does not fit into a replica's 1024 slots"):
        simulate(
            [TraceRequest(0.0, 2000, 1)],
            policy=PolicyName.COST,
            num_replicas=1,
            load=0.5,
            speed=ReplicaSpeed(num_slots=1024),
        )


def write_traces(directory: Path) -> tuple[Path, Path]:
    mooncake, azure = directory / "chats.jsonl", directory / "azure.csv"
    rows = [
        {"timestamp": 1000 * r.arrival_s, "input_length": r.num_prompt_tokens, "output_length": r.num_output_tokens,
         "hash_ids": [*r.block_hashes, 10**6 + i]}
        for i, r in enumerate(conversations(8, 3))
    ]  # fmt: skip
    mooncake.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"2023-11-16 18:15:{i:02}.6805900,{300 + i},{10 + i}" for i in range(20)]
    azure.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines, ""]))
    return mooncake, azure


def test_traces_are_read_as_published(tmp_path):
    mooncake, azure = write_traces(tmp_path)
    chats = read_trace(mooncake)
    assert chats[0].arrival_s == 0.0
    assert chats[0].block_hashes == conversations(8, 3)[0].block_hashes  # the last id names a block that is not full
    assert read_trace(azure)[1] == TraceRequest(1.0, 301, 11)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("trace.txt", "", "ends in .jsonl"),
        ("trace.csv", "a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("trace.jsonl", '{"timestamp": 1}\n', "input_length"),
        ("trace.jsonl", "no json\n", "not a trace"),
        ("trace.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "is empty"),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_trace(path)
    assert str(path) in str(error.value)


def test_the_command_prints_a_row_for_every_combination(tmp_path):
    mooncake, azure = write_traces(tmp_path)
    command = [sys.executable, "-m", "benchmarks.routing_sim", str(mooncake), str(azure)]
    command += ["--replicas", "1", "2", "--loads", "0.5", "--routers", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    combinations = {(row["trace"], row["replicas"], row["policy"]) for row in rows}
    assert combinations == {(t, n, str(p)) for t in ("chats", "azure") for n in (1, 2) for p in PolicyName}
    refused = subprocess.run([*command, "--loads", "0"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "positive" in refused.stderr


def test_a_decision_is_measured():
    command = [sys.executable, "-m", "benchmarks.routing_decision", "--replicas", "2", "--decisions", "100"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["rank_us"] > 0
