"""What is decided as an application is deployed: a changed `user_config` restarts nothing, an open port needs keys."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from live_server import Server

from chaos.fleet import Fleet, emulated
from llm.errors import ConfigError

pytestmark = pytest.mark.timeout(120)


class Deployed(Fleet):
    """An application that is deployed as `serve deploy` does: by a configuration file's content."""

    def deploy_with(self, args: dict[str, Any], user_config: dict[str, Any]) -> None:
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        application = {
            "name": self.name,
            "route_prefix": self.path,
            "import_path": "deployments.app:build_app",
            "args": args,
            "deployments": [{"name": "Router", "user_config": user_config}],
        }
        schema = ServeDeploySchema.model_validate({"applications": [application]})
        _get_global_client().deploy_apps(schema, _blocking=True)


@pytest.fixture
def deployed(server: Server) -> Iterator[Deployed]:
    from ray import serve

    deployed = Deployed(server.url, "live")
    yield deployed
    serve.delete(deployed.name, _blocking=False)  # Serve waits for two seconds


async def statuses(url: str) -> list[int]:
    """Of five requests at once, for a replica that takes one and a queue that takes what the settings say."""
    async with httpx.AsyncClient(timeout=30) as client:
        body = {"model": "demo", "prompt": "abc", "max_tokens": 30}
        asking = [client.post(f"{url}/v1/completions", json=body) for _ in range(5)]
        return sorted(response.status_code for response in await asyncio.gather(*asking))


def test_user_config_changes_a_running_router(server: Server, deployed: Deployed):
    args = {**emulated(1), "engine": {"max_batch_size": 1, "num_pages": 512}}
    deployed.deploy_with(args, {})
    server.wait_for(lambda: asyncio.run(statuses(deployed.url)) == [200] * 5, what="some are refused")
    before = deployed.router_pids(), deployed.replica_pids()
    deployed.deploy_with(args, {"admission": {"max_queue_tokens": 1}})
    server.wait_for(
        lambda: asyncio.run(statuses(deployed.url)) == [200] * 3 + [429] * 2, what="the new bound has no effect"
    )
    assert (deployed.router_pids(), deployed.replica_pids()) == before, "something was restarted"


def test_an_application_without_keys_is_refused_behind_an_open_port(server: Server, monkeypatch: pytest.MonkeyPatch):
    """`serve run` and `serve deploy` ask nobody else: the builder looks where Serve really listens."""
    from deployments import app
    from deployments.config import AppConfig

    front_end = app.find_front_end()
    assert front_end.url == server.url
    everywhere = replace(front_end, host="0.0.0.0")
    monkeypatch.setattr(app, "find_front_end", lambda: everywhere)
    with pytest.raises(ConfigError, match="allow_open_without_keys"):
        app.build_app(AppConfig(model="configs/demo"))
