"""Run by test_live_config.py in a process of its own: deploys as `serve deploy` does, and says what became of it."""

import json
import time

import httpx

from chaos.fleet import Fleet, cluster, emulated


def deploy(args: dict, user_config: dict) -> None:
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    application = {
        "name": FLEET._name,
        "route_prefix": "/live",
        "import_path": "deployments.app:build_app",
        "args": args,
        "deployments": [{"name": "Router", "user_config": user_config}],
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}), _blocking=True)


def processes() -> list[list[int]]:
    return [FLEET.router_pids(), FLEET.replica_pids()]


def statuses() -> list[int]:
    """Of five requests at once, for a replica that takes one and a queue that takes what the settings say."""
    import asyncio

    async def ask() -> list[int]:
        async with httpx.AsyncClient(timeout=30) as client:
            body = {"model": "demo", "prompt": "abc", "max_tokens": 30}
            asking = [client.post(f"{FLEET.url}/v1/completions", json=body) for _ in range(5)]
            return sorted(response.status_code for response in await asyncio.gather(*asking))

    return asyncio.run(ask())


def wait_for_statuses(expected: list[int]) -> bool:
    end = time.monotonic() + 10
    while statuses() != expected:
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


if __name__ == "__main__":
    with cluster() as front_end:
        FLEET = Fleet(front_end, "live")
        args = {**emulated(1), "engine": {"max_batch_size": 1, "num_pages": 512}}
        deploy(args, {})
        before = processes()
        was_open = wait_for_statuses([200] * 5)
        deploy(args, {"admission": {"max_queue_tokens": 1}})
        is_closed = wait_for_statuses([200] * 3 + [429] * 2)
        after = processes()
        print(json.dumps({"was_open": was_open, "is_closed": is_closed, "before": before, "after": after}))
