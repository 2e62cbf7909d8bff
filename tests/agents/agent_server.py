"""A server as clients meet it: HTTP on a real socket, in front of a model that writes by a script."""

import asyncio
import hashlib
import socket
import threading

import uvicorn
from in_process import LocalClient, Service, end_service
from scripted_model import ScriptedModel

from deployments.config import AppConfig
from deployments.replica.engine_replica import EngineReplica
from deployments.router.keys import ApiKey

KEY = "sk-agents"
"""What every client must bring."""


class AgentServer:
    """Serves a scripted model on a real socket, in a thread; run it as a context manager.

    Attributes:
        model: its script may change between two requests.
        url: where it answers.
    """

    def __init__(self, config: AppConfig, model: ScriptedModel) -> None:
        self.model = model
        self._config = config
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run_to_end)

    def __enter__(self) -> "AgentServer":
        self._thread.start()
        self._ready.wait()
        self._raise_failure()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._raise_failure()

    def _run_to_end(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - the thread's edge: raised again in the test's thread
            self._failure = error
        finally:
            self._ready.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _serve(self) -> None:
        key = ApiKey("agents", hashlib.sha256(KEY.encode()).digest())
        service = Service(self._config, LocalClient([EngineReplica(self._config, "replica")]), (key,))
        await service.router.wait_until_ready()
        server = self._server = uvicorn.Server(uvicorn.Config(service.api, lifespan="off", log_level="warning"))
        self._ready.set()
        await server.serve([self._listening])
        await end_service(service)
