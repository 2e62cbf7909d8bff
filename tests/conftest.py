"""One Ray cluster for the session, with the demo model on two CPU replicas behind one router, reached over HTTP."""

import os
from collections.abc import Iterator

import pytest
import torch

# Where there is no GPU, kernels run in Triton's interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton_interpreter
from live_server import APP_NAME, ROOT, Server, free_port, wait_until_ready

if os.environ.get("TRITON_INTERPRET") == "1":
    triton_interpreter.quicken()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    import ray
    from ray import serve

    from deployments.api.send_timeout import PROXY_VARIABLES, TIMEOUT_VARIABLE
    from deployments.app import build_app
    from deployments.config import AppConfig

    port = free_port()
    # Serve's proxy is started with these.
    os.environ.update({**PROXY_VARIABLES, TIMEOUT_VARIABLE: "3"})
    ray.init(num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, namespace="serve", address="local")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = AppConfig.model_validate(
            {
                "model": str(ROOT / "configs" / "demo"),
                "device": "cpu",
                "engine": {"max_batch_size": 16},
                "replicas": {"num_replicas": 2, "torch_threads": 1, "graceful_shutdown_timeout_s": 5},
                "router": {"graceful_shutdown_timeout_s": 5},
            }
        )
        serve.run(build_app(config), name=APP_NAME, route_prefix="/")
        server = Server(f"http://127.0.0.1:{port}")
        wait_until_ready(server, num_replicas=2)
        yield server
    finally:
        serve.shutdown()
        ray.shutdown()
