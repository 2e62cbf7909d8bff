"""The last 15 minutes of a fleet: percentiles that add up over routers, in bounded memory."""

import math
import pickle
import random

import pytest

from deployments.observe.history import HISTORY_S, INTERVAL_S, History, RouterHistory, describe
from deployments.observe.latencies import Latencies, sum_of

START = 1_800_000_000.0


class Clock:
    """Unix time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def history(clock: Clock) -> History:
    return History(clock)


def sample(history: History, num_live: int = 0, num_waiting: int = 0, num_serving: int = 1, **generated: int) -> None:
    history.sample(num_live=num_live, num_waiting=num_waiting, num_serving=num_serving, generated=generated)


def test_percentiles_are_within_a_bucket_of_the_true_ones():
    """Nearest rank over 5,000 durations from 20 µs to minutes, against the sorted list."""
    draw = random.Random(1)
    durations = sorted(10 ** draw.uniform(-4.7, 2.5) for _ in range(5000))
    latencies = Latencies()
    for duration in draw.sample(durations, len(durations)):
        latencies.add(duration)
    assert latencies.num == 5000
    for percent in (1, 50, 90, 99, 99.9, 100):
        true = durations[math.ceil(len(durations) * percent / 100) - 1]
        assert latencies.percentile(percent) == pytest.approx(true, rel=0.025)


def test_no_duration_has_no_percentile_and_the_absurd_ones_count_as_the_nearest():
    latencies = Latencies()
    assert latencies.percentile(50) is None
    for duration in (-1.0, 0.0, 1e-9, 1e9):
        latencies.add(duration)
    assert latencies.num == 4
    assert latencies.percentile(75) == pytest.approx(1e-5, rel=0.05)
    assert latencies.percentile(100) == pytest.approx(3600, rel=0.05)


def test_the_sum_of_two_is_as_if_one_had_seen_everything():
    draw, parts, whole = random.Random(2), [Latencies(), Latencies()], Latencies()
    for _ in range(1000):
        duration = draw.expovariate(20)
        draw.choice(parts).add(duration)
        whole.add(duration)
    total = sum_of(parts)
    assert total.num == whole.num
    assert [total.percentile(percent) for percent in range(1, 101)] == [
        whole.percentile(percent) for percent in range(1, 101)
    ]
    assert parts[0].num + parts[1].num == 1000, "the parts stay as they were"


def test_what_happened_is_in_the_interval_of_its_time(history: History, clock: Clock):
    history.note_first_token(0.2)
    clock.now += INTERVAL_S
    history.note_gaps(0.01, 0.03)
    first, second = history.intervals()
    assert second.number == first.number + 1
    assert (first.ttft.num, first.gaps.num, second.ttft.num, second.gaps.num) == (1, 0, 0, 2)


def test_tokens_count_from_when_a_replica_is_first_seen(history: History, clock: Clock):
    """What it made before, a restart under the same id, and a replica that is gone add nothing."""
    sample(history, a=1_000_000)
    sample(history, a=1_000_100, b=50)
    sample(history, a=1_000_100, b=80)
    sample(history, b=10)
    sample(history, a=5, b=10)
    (interval,) = history.intervals()
    assert interval.num_generated_tokens == 100 + 30


def test_the_rate_is_over_the_time_between_samples(history: History, clock: Clock):
    """A steady 70 tokens/s is told as 70 in every interval, even one that has just begun, whenever samples come."""
    draw, total = random.Random(4), 0.0
    sample(history, a=0)
    for _ in range(30):
        pause_s = draw.choice([0.5, 1.0, 1.5])
        clock.now += pause_s
        total += 70 * pause_s
        sample(history, a=int(total))
        points = describe([RouterHistory("r", history.intervals())], clock.now)["points"]
        assert [point["tokens_per_s"] for point in points] == [70.0] * len(points)
    assert len(points) > 3


def test_a_interval_keeps_the_busiest_moment_and_the_fewest_replicas(history: History):
    for num_live, num_serving in ((1, 2), (9, 1), (3, 2)):
        sample(history, num_live, num_live // 3, num_serving)
    (interval,) = history.intervals()
    assert (interval.num_live, interval.num_waiting, interval.num_serving) == (9, 3, 1)


def test_nothing_is_lost_on_the_way_to_another_router():
    draw, latencies = random.Random(5), Latencies()
    for _ in range(300):
        latencies.add(draw.lognormvariate(-4, 0.3))
    data = pickle.dumps(latencies)
    arrived = pickle.loads(data)
    assert len(data) < 500
    assert arrived.num == 300
    assert [arrived.percentile(percent) for percent in (1, 50, 99)] == [
        latencies.percentile(percent) for percent in (1, 50, 99)
    ]
    arrived.add(0.1)
    assert (arrived.num, latencies.num) == (301, 300)


def test_it_forgets_after_15_minutes_and_never_grows(history: History, clock: Clock):
    """A day with every kind of duration in every interval, as it travels to another router: less than 1 MB."""
    draw = random.Random(3)
    for _ in range(2 * HISTORY_S // INTERVAL_S):
        clock.now += INTERVAL_S
        for _ in range(300):
            history.note_gaps(10 ** draw.uniform(-5, 3.5))
            history.note_first_token(10 ** draw.uniform(-5, 3.5))
    assert len(history.intervals()) == HISTORY_S // INTERVAL_S
    assert len(pickle.dumps(history.intervals())) < 1_000_000
    clock.now += HISTORY_S / 2
    assert len(history.intervals()) == HISTORY_S // INTERVAL_S // 2, "nobody has noted anything since"
    clock.now += HISTORY_S
    assert history.intervals() == ()


def test_a_clock_that_is_set_back_does_no_harm(history: History, clock: Clock):
    history.note_gaps(0.01)
    clock.now -= 3600
    history.note_gaps(0.01)
    assert sum(interval.gaps.num for interval in history.intervals()) == 2


def test_routers_add_up_but_what_the_replicas_made_counts_once(clock: Clock):
    """Both routers hear of the same replica; each has its own requests."""
    one, other = History(clock), History(clock)
    for history, num_live in ((one, 3), (other, 4)):
        sample(history, num_live, a=0)
    clock.now += 4
    for history, ttft, num_live in ((one, 0.1, 3), (other, 0.3, 4)):
        sample(history, num_live, a=400)
        for _ in range(10):
            history.note_first_token(ttft)
    clock.now += INTERVAL_S
    parts = [
        RouterHistory("one", one.intervals(), {"num_live": 3}),
        RouterHistory("other", other.intervals(), {"num_live": 4}),
    ]
    told = describe(parts, clock.now)
    (point,) = told["points"]
    assert (told["num_routers"], told["totals"]) == (2, {"num_live": 7})
    assert (point["num_live"], point["tokens_per_s"]) == (7, 100)
    ttft = told["latency"]["60"]["ttft"]
    assert ttft["num"] == 20
    assert ttft["p50_s"] == pytest.approx(0.1, rel=0.03)
    assert ttft["p90_s"] == pytest.approx(0.3, rel=0.03)


def test_the_last_minute_is_told_from_the_last_15(history: History, clock: Clock):
    history.note_gaps(1.0)
    clock.now += 120
    history.note_gaps(0.01)
    latency = describe([RouterHistory("r", history.intervals())], clock.now)["latency"]
    assert latency["60"]["gap"]["num"] == 1
    assert latency["900"]["gap"]["num"] == 2
    assert latency["60"]["gap"]["p99_s"] == pytest.approx(0.01, rel=0.03)
    assert latency["900"]["gap"]["p99_s"] == pytest.approx(1.0, rel=0.03)
    assert latency["60"]["ttft"] == {"num": 0, "p50_s": None, "p90_s": None, "p99_s": None}
