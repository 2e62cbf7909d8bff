"""The root cause of a start that failed, out of the text that Ray Serve has."""

from types import SimpleNamespace

import pytest

from deployments.serve.failures import failure_of, has_failed_repeatedly, root_cause, start_failure

_REPLICA = """The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or \
initial health check failing. See controller logs for details. Error:
\x1b[36mray::ServeReplica:rayline:EngineReplica.initialize_and_get_metadata()\x1b[39m (pid=7, ip=192.0.2.2)
  File "/app/ray/serve/_private/replica.py", line 1, in initialize_and_get_metadata
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/app/deployments/replica/engine_factory.py", line 1, in make_engine
    raise CheckpointError("model.safetensors lacks x")
"""


@pytest.mark.parametrize(
    ("last", "cause"),
    [
        ("llm.errors.CheckpointError: model.safetensors lacks x; download it again",
         "model.safetensors lacks x; download it again"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate\n2.00 GiB.",
         "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        ("AssertionError: no CUDA", "AssertionError: no CUDA"),
    ],
)  # fmt: skip
def test_the_last_exception_is_the_cause(last: str, cause: str):
    assert root_cause(_REPLICA + last + "\n") == cause


def test_a_text_without_an_exception_is_told_as_it_is():
    assert root_cause("The actor died\nunexpectedly.") == "The actor died unexpectedly."
    assert len(root_cause("x" * 100_000)) < 1000


def app(status: str, message: str = "", **deployments: str) -> SimpleNamespace:
    states = {name: SimpleNamespace(message=text) for name, text in deployments.items()}
    return SimpleNamespace(status=status, message=message, deployments=states)


def test_the_first_replica_that_fails_is_enough():
    """Serve would try again several times, each as long as loading a model takes."""
    message = "A replica failed to start with exception. Retrying 2 more time(s). Error:\nValueError: no"
    assert failure_of(app("DEPLOYING", Router="", EngineReplica=message)) == "ValueError: no"
    assert failure_of(app("DEPLOYING", Router="", EngineReplica="Waiting for resources")) is None


def test_an_application_that_cannot_be_built_fails_too():
    message = "Deploying app 'rayline' failed with exception:\nllm.errors.ConfigError: api_keys_env: X is not set"
    assert failure_of(app("DEPLOY_FAILED", message)) == "api_keys_env: X is not set"


def test_one_failure_is_told_from_a_series():
    once = "A replica failed to start with exception. Retrying. Error:\nValueError: no"
    assert (start_failure(once), has_failed_repeatedly(once)) == ("ValueError: no", False)
    assert (start_failure(_REPLICA + "OSError: gone"), has_failed_repeatedly(_REPLICA)) == ("OSError: gone", True)
    assert (start_failure("Upscaling from 0 to 1 replicas."), has_failed_repeatedly("")) == (None, False)
