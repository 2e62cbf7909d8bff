"""A real Prometheus scrapes the running server by our configuration, and answers every panel of the Grafana board."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
import yaml
from live_server import ROOT, Server, free_port

DEPLOY = ROOT / "deploy"
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus: apt-get install")

MAY_BE_EMPTY = {"Prefix-hit rate", "Time per output token"}
"""Panels whose quotient has no value while nothing happens."""


@pytest.fixture
def prometheus(server: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """Prometheus with our configuration, but for the address and pace of scraping."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
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
            server.wait_for(lambda: is_ready(client), 30, "prometheus does not start")
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


@needs_prometheus
def test_prometheus_scrapes_and_the_board_has_data(server: Server, prometheus: httpx.Client):
    server.wait_for(lambda: value(prometheus, 'up{job="rayline"}') == 1, 30, "nothing is scraped")
    end = time.monotonic() + 4
    while time.monotonic() < end:
        server.ask()
    server.wait_for(lambda: value(prometheus, "sum(rate(rayline:requests_total[1m]))") > 0, 20, "no rates yet")
    assert value(prometheus, "sum(rayline:replica_serving)") == 2
    assert value(prometheus, 'sum(vllm:request_success_total{finished_reason="stop"})') > 4
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
def test_rules_are_understood_and_quiet(server: Server, prometheus: httpx.Client):
    server.wait_for(lambda: value(prometheus, 'up{job="rayline"}') == 1, 30, "nothing is scraped")
    time.sleep(2)
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"])
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_rays_own_export_has_routers_and_replicas(server: Server):
    port = ray.nodes()[0]["MetricsExportPort"]
    server.ask()
    wanted = (
        "ray_vllm_time_to_first_token_seconds_count",
        "ray_vllm_num_requests_running",
        "ray_vllm_generation_tokens",
        "ray_vllm_kv_cache_usage_perc",
    )

    def engines() -> dict[str, int]:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        lines = {name: [line for line in text.splitlines() if line.startswith(name)] for name in wanted}
        return {name: len(found) for name, found in lines.items()}

    server.wait_for(lambda: all(engines().values()), 40, "Ray's export lacks some of them")
    assert engines()["ray_vllm_num_requests_running"] >= 2, "one for each replica"


@needs_prometheus
def test_configuration_passes_promtool():
    for arguments in (["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"]):
        result = subprocess.run(["promtool", *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
