"""Prometheus' own rule tester, on samples of a service that runs: each alert fires in its fault, none without one."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from in_process import ServiceFactory, emulated_config
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).parents[3] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
BOARD = DEPLOY / "grafana" / "dashboards" / "rayline.json"
NUM_STEPS = 60
"""Of 15 s: longer than any alert waits."""

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs prometheus: apt-get install")

Samples = dict[str, list[float]]
"""Values over time by series."""
Fault = Callable[[Samples], None]


def set_all(name: str, value: Callable[[int], float]) -> Fault:
    """Give every series whose name and labels begin so these values over time."""

    def change(samples: Samples) -> None:
        found = [series for series in samples if series.startswith(name)]
        assert found, f"nothing is called {name}"
        for series in found:
            samples[series] = [value(step) for step in range(NUM_STEPS)]

    return change


def together(*faults: Fault) -> Fault:
    def change(samples: Samples) -> None:
        for fault in faults:
            fault(samples)

    return change


def no_target(samples: Samples) -> None:
    del samples['up{job="rayline"}']


def stop_counting(samples: Samples) -> None:
    for series, values in samples.items():
        samples[series] = values[:1] * NUM_STEPS


def slow_first_tokens(samples: Samples) -> None:
    """All of them between 5 and 40 s."""
    for series in samples:
        name, _, labels = series.partition("{")
        if name == "vllm:time_to_first_token_seconds_bucket":
            bound = float(labels.partition('le="')[2].partition('"')[0])
            samples[series] = [float(step * (bound >= 40)) for step in range(NUM_STEPS)]


FAULTS: dict[str, tuple[str, Fault]] = {
    "scrapes fail": ("RaylineDown", set_all("up", lambda _: 0)),
    "nothing to scrape": ("RaylineDown", no_target),
    "no replica": ("RaylineNoReplica", set_all("rayline:router_replicas", lambda _: 0)),
    "nobody starts": (
        "RaylineNoStart",
        together(
            set_all("rayline:router_replicas", lambda _: 0),
            set_all("rayline:min_replicas", lambda _: 0),
            set_all("rayline:router_waiting_requests", lambda _: 3),
        ),
    ),
    "one is not heard": (
        "RaylineReplicaSilent",
        set_all('rayline:replica_silent{engine="replica-1"', lambda step: step > 5),
    ),
    "refusals": ("RaylineRefusing", set_all("rayline:requests_refused_total", lambda step: step)),
    "slow": ("RaylineSlowFirstToken", slow_first_tokens),
    "failovers": ("RaylineFailovers", set_all("rayline:failovers_total", lambda step: step)),
    "errors": (
        "RaylineErrors",
        set_all('vllm:request_success_total{finished_reason="error"', lambda step: step),
    ),
    "wrong keys": ("RaylineKeysFileWrong", set_all("rayline:api_keys_file_wrong", lambda step: step > 5)),
    "no accountant": ("RaylineAccountantAway", set_all("rayline:accountant_away", lambda step: step > 5)),
    "pool full": ("RaylinePoolFull", set_all('vllm:kv_cache_usage_perc{engine="replica-0"', lambda _: 0.97)),
}
GOOD_STATES: dict[str, Fault] = {
    "keys file put in place in two steps": set_all("rayline:api_keys_file_wrong", lambda step: step in (10, 11)),
    "accountant replaced": set_all("rayline:accountant_away", lambda step: step in (10, 11)),
    "under load": lambda samples: None,
    "idle": stop_counting,
    "scaled to zero": together(
        set_all("rayline:router_replicas", lambda _: 0), set_all("rayline:min_replicas", lambda _: 0)
    ),
    "woken from zero, starting for four minutes": together(
        set_all("rayline:min_replicas", lambda _: 0),
        set_all("rayline:router_replicas", lambda step: step < 10 or step > 26),
        set_all("rayline:router_waiting_requests", lambda step: 10 <= step <= 26),
    ),
}


async def samples_under_load(make_service: ServiceFactory) -> Samples:
    """What a service exports after some requests, going on like that: counters rise, gauges stay."""
    service = await make_service(num_replicas=2)
    for _ in range(4):
        await service.post("/v1/completions", prompt="abc", max_tokens=5)
    samples: Samples = {'up{job="rayline"}': [1.0] * NUM_STEPS}
    for family in text_string_to_metric_families((await service.http.get("/metrics")).text):
        rises = family.type in ("counter", "histogram")
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}"] = [
                sample.value * (step + 1 if rises else 1) for step in range(NUM_STEPS)
            ]
    return samples


def firing(samples: Samples, expected: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """promtool's verdict on whether exactly these alerts fire at the end."""
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": series, "values": " ".join(repr(float(value)) for value in values)}
                    for series, values in samples.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": eval_time,
                        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names],
                    }
                    for eval_time, names in (("14m30s", expected), *([] if expected else [("6m30s", [])]))
                ],
            }
        ],
    }
    path = directory / "test.yml"
    path.write_text(yaml.safe_dump(test))
    return subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)


@needs_promtool
@pytest.mark.parametrize("state", GOOD_STATES)
async def test_no_alert_fires_while_all_is_well(make_service: ServiceFactory, tmp_path: Path, state: str):
    samples = await samples_under_load(make_service)
    GOOD_STATES[state](samples)
    verdict = firing(samples, [], tmp_path)
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr


@needs_promtool
@pytest.mark.parametrize("fault", FAULTS)
async def test_each_alert_fires_in_its_fault_and_no_other_does(
    make_service: ServiceFactory, tmp_path: Path, fault: str
):
    alert, change = FAULTS[fault]
    samples = await samples_under_load(make_service)
    change(samples)
    verdict = firing(samples, [alert], tmp_path)
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr


def test_every_alert_has_its_fault():
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    assert {rule["alert"] for rule in group["rules"]} == {alert for alert, _ in FAULTS.values()}


@pytest.mark.parametrize("path", [RULES, BOARD], ids=["alerts", "board"])
async def test_only_metrics_that_are_exported_are_asked_for(make_service: ServiceFactory, path: Path):
    service = await make_service(emulated_config(batches={"store": "memory://board"}))
    text = (await service.http.get("/metrics")).text
    # A counter of what has not happened yet has its type alone.
    exported = set(re.findall(r"^(?:# TYPE )?([a-z_:0-9]+)[ {]", text, re.MULTILINE))
    asked = set(re.findall(r"(?:vllm|rayline):[a-z_0-9]+", path.read_text()))
    assert asked
    assert asked - exported == set()
