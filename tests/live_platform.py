"""A platform on Ray whose models change while streams are read: how tests deploy it, ask it and see what it runs."""

import json
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx

from chaos.fleet import Fleet, emulated, pids_of


def entry(name: str, tokens_per_s: float = 10.0, num_replicas: int = 1, **changes: Any) -> dict[str, Any]:
    """A model with emulated engines, as an entry of `models`."""
    args = emulated(num_replicas, tokens_per_s)
    del args["router"]
    return {**args, "served_model_name": name, **changes}


class Platform(Fleet):
    """An application that is deployed as `serve deploy` does: by a configuration file's content.

    Args:
        front_end: address of Serve's front end.
        name: of the application, and its path.
        key: API key to ask it with; "" where there are none.
    """

    def __init__(self, front_end: str, name: str, key: str = "") -> None:
        super().__init__(front_end, name)
        self.http = httpx.Client(base_url=self.url, headers=authorization(key), timeout=60)

    def deploy_models(self, *models: dict[str, Any], **settings: Any) -> None:
        """Begin to bring it to these models; `settings` are those of the whole application."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        router = {"num_cpus": 0.1, "graceful_shutdown_timeout_s": 60, **settings.pop("router", {})}
        application = {
            "name": self.name,
            "route_prefix": self.path,
            "import_path": "deployments.app:build_app",
            "args": {"models": models, "router": router, **settings},
        }
        schema = ServeDeploySchema.model_validate({"applications": [application]})
        _get_global_client().deploy_apps(schema, _blocking=False)  # it would wait no longer than a minute

    def pids(self, model: str) -> list[int]:
        """Processes of a model's replicas."""
        return pids_of(f"ray::ServeReplica:{self.name}:EngineReplica-{model}")

    def lists(self, **states: str) -> bool:
        """Whether every router that still gets requests knows these models, in these states."""
        return all(self.states() == states for _ in range(10))

    def states(self) -> dict[str, str]:
        """The state of each model; none while no router answers."""
        try:
            answer = self.http.get("/v1/models")
        except httpx.TransportError:
            return {}
        return {model["id"]: model["state"] for model in answer.json()["data"]} if answer.status_code == 200 else {}


class Stream:
    """A streamed answer of a fixed length that is read in a thread.

    Args:
        pool: has the thread.
        url: of the platform.
        model: or adapter.
        num_tokens: the answer's length.
        key: API key; "" where there are none.

    Attributes:
        text: what has arrived.
        usage: token counts at the end of the answer.
        request_id: the request's `X-Request-ID`.
    """

    def __init__(self, pool: ThreadPoolExecutor, url: str, model: str, num_tokens: int, key: str = "") -> None:
        self.model = model
        self.key = key
        self.num_tokens = num_tokens
        self.request_id = uuid.uuid4().hex
        self.text = ""
        self.num_chunks = 0
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}
        self._reading: Future[None] = pool.submit(self._read, url)

    def _read(self, url: str) -> None:
        body = {
            "model": self.model, "prompt": "abc", "max_tokens": self.num_tokens, "ignore_eos": True, "stream": True,
            "seed": 1, "stream_options": {"include_usage": True},
        }  # fmt: skip
        headers = {**authorization(self.key), "x-request-id": self.request_id}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        self.num_chunks += 1
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    def is_whole(self) -> bool:
        """Whether all of it has arrived; waits for its end, which may be the death of its router."""
        try:
            self._reading.result()
        except httpx.TransportError:
            return False
        return bool(self.usage)

    def whole(self) -> str:
        """Its text, once it has ended as it should."""
        self._reading.result()
        assert (self.finish_reason, self.usage["completion_tokens"]) == ("length", self.num_tokens)
        return self.text


def authorization(key: str) -> dict[str, str]:
    """The header that carries an API key; none for none."""
    return {"authorization": f"Bearer {key}"} if key else {}
