"""One Ray cluster for the session, with two applications: the demo model, and engines that tests may break."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# Where there is no GPU, kernels run in Triton's interpreter, which must be asked for before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# When it is imported, litellm asks the network for prices, three times and with pauses, unless it is told not to.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import triton_interpreter
from live_server import APP_NAME, ROOT, Server, free_port, wait_until_ready

if os.environ.get("TRITON_INTERPRET") == "1":
    triton_interpreter.quicken()

if TYPE_CHECKING:
    from chaos.fleet import Fleet


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process of this machine's tests start Ray at a time: its node gives up if its parts take 30 s."""
    with (Path(tempfile.gettempdir()) / "rayline-tests-start-ray").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The demo model on two CPU replicas behind one router."""
    import ray
    from ray import serve

    from deployments.api.send_timeout import PROXY_VARIABLES, TIMEOUT_VARIABLE
    from deployments.app import build_app
    from deployments.config import AppConfig

    port = free_port()
    # Serve's proxy is started with these.
    os.environ.update({**PROXY_VARIABLES, TIMEOUT_VARIABLE: "3"})
    with one_at_a_time():
        ray.init(
            num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, namespace="serve", address="local"
        )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        config = AppConfig.model_validate(
            {
                "model": str(ROOT / "configs" / "demo"),
                "device": "cpu",
                "engine": {"max_batch_size": 16},
                "scoring": {"method": "embeddings"},
                "replicas": {"num_replicas": 2, "torch_threads": 1, "graceful_shutdown_timeout_s": 5},
                "router": {"graceful_shutdown_timeout_s": 5},
            }
        )
        serve.run(build_app(config), name=APP_NAME, route_prefix="/")
        server = Server(f"http://127.0.0.1:{port}")
        wait_until_ready(server, num_replicas=2)
        yield server
    finally:
        ray.shutdown()  # Serve ends with it: its own shutdown would wait for every replica, and prove nothing here


@pytest.fixture(scope="session")
def fleet(server: Server, tmp_path_factory: pytest.TempPathFactory) -> "Fleet":
    """Three emulated engines behind one router, for faults that leave it as they found it: a start takes long.

    Each engine breaks when its file in the fault directory says so, or when it embeds the poisonous token.
    """
    from chaos.embedding_faults import POISON
    from chaos.fleet import Fleet, emulated

    emulation = {
        "tokens_per_s": 50.0, "prefill_tokens_per_s": 2000.0, "max_seq_len": 4096,
        "fault_dir": str(tmp_path_factory.mktemp("faults")), "poison_token_id": POISON, "poison": "hang",
    }  # fmt: skip
    args = emulated(3, emulation=emulation)
    args["replicas"] |= {"stall_timeout_s": 3, "graceful_shutdown_timeout_s": 5}
    args["router"] |= {"stall_timeout_s": 3, "graceful_shutdown_timeout_s": 5}
    fleet = Fleet(server.url, "breakable")  # /fleet is a page of the server
    fleet.deploy(args)
    return fleet  # it ends with the cluster
