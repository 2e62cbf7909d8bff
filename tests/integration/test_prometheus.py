"""A real Prometheus scrapes the running server by our configuration, and answers every panel of the Grafana board."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from live_server import APP_NAME, ROOT, Server, free_port, wait_until_ready

DEPLOY = ROOT / "deploy"
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus: apt-get install")

MAY_BE_EMPTY = {"Prefix-hit rate", "Time per output token", "Requests/s by adapter: the ten largest"}
"""Panels whose quotient has no value while nothing happens, and the one of adapters, of which this fleet has none."""


@pytest.fixture(scope="module")
def fleet(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two routers behind Serve's proxy, which sends each scrape to either, and two engines that make letters."""
    from ray import serve

    from deployments.app import build_app
    from deployments.config import AppConfig

    config = AppConfig.model_validate(
        {
            "model": str(ROOT / "configs" / "demo"),
            "engine_kind": "emulated",
            "emulation": {"tokens_per_s": 500},
            "replicas": {"num_replicas": 2, "graceful_shutdown_timeout_s": 1},
            "router": {"num_replicas": 2, "graceful_shutdown_timeout_s": 1},
            "batches": {"store": str(tmp_path_factory.mktemp("batches"))},
        }
    )
    name = f"{APP_NAME}-prometheus"
    serve.run(build_app(config), name=name, route_prefix="/prometheus")
    try:
        fleet = Server(f"{server.url}/prometheus")
        wait_until_ready(fleet, num_replicas=2)
        yield fleet
    finally:
        serve.delete(name, _blocking=False)  # Serve waits for two seconds


@pytest.fixture
def prometheus(fleet: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """Prometheus with our configuration, but for the address and pace of scraping."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "1s"}
    address, _, prefix = fleet.url.removeprefix("http://").partition("/")
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [address]
    config["scrape_configs"][0]["metrics_path"] = f"/{prefix}{config['scrape_configs'][0]['metrics_path']}"
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", tmp_path)
    port = free_port()
    process = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
         f"--web.listen-address=127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            fleet.wait_for(lambda: is_ready(client), 30, "prometheus does not start")
            yield client
    finally:
        process.terminate()
        process.wait(timeout=10)


def query(prometheus: httpx.Client, expression: str) -> list[dict]:
    answer = prometheus.get("/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", f"{expression}: {answer}"
    return answer["data"]["result"]


def is_ready(prometheus: httpx.Client) -> bool:
    try:
        return prometheus.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def value(prometheus: httpx.Client, expression: str) -> float:
    results = query(prometheus, expression)
    return float(results[0]["value"][1]) if results else 0.0


def say_something(fleet: Server) -> None:
    fleet.openai.completions.create(model="demo", prompt="abc", max_tokens=10)


@needs_prometheus
def test_prometheus_scrapes_two_routers_and_the_board_has_data(fleet: Server, prometheus: httpx.Client):
    fleet.wait_for(lambda: value(prometheus, 'up{job="rayline"}') == 1, 30, "nothing is scraped")
    assert fleet.http.post("/v1/completions", json={"model": "nobody", "prompt": "abc"}).status_code == 404
    before = value(prometheus, "sum(rayline:requests_total)")
    num_scrapes, num_requests = value(prometheus, "count_over_time(up[5m])"), 0
    while value(prometheus, "count_over_time(up[5m])") < num_scrapes + 8:
        say_something(fleet)
        num_requests += 1
    fleet.wait_for(
        lambda: value(prometheus, "sum(rayline:requests_total)") == before + num_requests, 20, "requests are missing"
    )
    assert value(prometheus, "count(rayline:requests_total)") == 2, "one series a router"
    assert value(prometheus, "min(rayline:requests_total)") > 0, "both had work"
    assert value(prometheus, "count(count by (engine) (vllm:generation_tokens_total))") == 2
    counting = query(prometheus, 'count by (__name__) ({__name__=~"(vllm|rayline):.+_(total|count|sum|bucket)"})')
    names = [result["metric"]["__name__"] for result in counting]
    assert {"vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_bucket", "rayline:moves_total"} <= {*names}
    fallen = [name for name in names if value(prometheus, f"sum(resets({name}[5m]))") > 0]
    assert fallen == []
    # On a busy machine a scrape may take longer than it is given; each of the others had every series.
    complete = "count_over_time(vllm:generation_tokens_total[5m]) >= on () group_left () sum_over_time(up[5m])"
    assert value(prometheus, f"count({complete})") == 2
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "rayline.json").read_text())
    assert len(board["panels"]) > 10
    for panel in board["panels"]:
        for target in panel["targets"]:
            expression = (
                target["expr"].replace("$__rate_interval", "1m").replace("$__range", "5m").replace("$model", ".*")
            )
            results = query(prometheus, expression)
            assert results or panel["title"] in MAY_BE_EMPTY, f"{panel['title']}: {expression} gives nothing"


@needs_prometheus
def test_rules_are_understood_and_quiet(fleet: Server, prometheus: httpx.Client):
    fleet.wait_for(lambda: value(prometheus, 'up{job="rayline"}') == 1, 30, "nothing is scraped")
    expected = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]

    def rules() -> list[dict]:
        groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    fleet.wait_for(lambda: {rule["health"] for rule in rules()} == {"ok"}, 20, "the rules are not evaluated")
    assert len(rules()) == len(expected)
    assert [rule["name"] for rule in rules() if rule["state"] == "firing"] == []


@needs_prometheus
def test_configuration_passes_promtool():
    for arguments in (["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"]):
        result = subprocess.run(["promtool", *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
