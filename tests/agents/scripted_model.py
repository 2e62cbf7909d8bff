"""A server as coding agents meet it: real HTTP, router, template and parsers; what the model writes is a script."""

import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from in_process import LocalClient, Service, end_service
from scripted_engine import ScriptedEngine, model_config

from deployments.config import AppConfig
from deployments.replica import engine_factory
from deployments.replica.engine_replica import EngineReplica
from deployments.router.keys import ApiKey

KEY = "sk-agents"
"""What every client must bring."""

CONTEXT = 2**17
"""Tokens; the demo checkpoint's tokenizer makes one of each byte, and an agent's first request has 90 kB."""

# After Qwen's: a system message comes first or not at all.
TEMPLATE = """
{%- if tools %}{{ '<|system|>' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
    {{- '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools>' }}
    {{- '\nCall one as <tool_call>{"name": …, "arguments": {…}}</tool_call><|end|>' }}
{%- elif messages[0].role == 'system' %}{{ '<|system|>' + messages[0].content + '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{ raise_exception('The system message must come first.') }}{% endif %}
    {%- elif message.role == 'tool' %}
        {{- '<|user|><tool_response>' + message.content + '</tool_response><|end|>' }}
    {%- else %}{{ '<|' + message.role + '|>' }}
        {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ '}</tool_call>' }}
        {%- endfor %}{{ '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""

Script = Callable[[str], str]
"""What the model writes, by the prompt's text without its control tokens."""


def called(name: str, **arguments: object) -> str:
    """A call in the format of the model's template."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@dataclass
class ScriptedModel:
    """What the model is to write, and what it was told.

    Attributes:
        prompts: as text, in the order in which they came.
    """

    script: Script = lambda _: "Hello."
    prompts: list[str] = field(default_factory=list)

    def answer(self, prompt: tuple[int, ...]) -> bytes:
        text = bytes(token for token in prompt if token < 256).decode()
        self.prompts.append(text)
        return self.script(text).encode()

    def follow(self, script: Script) -> None:
        """Answer with another script from now on, and forget what came before."""
        self.script = script
        self.prompts.clear()


class _Engine(ScriptedEngine):
    """Writes what its model's script says of the prompt."""

    model: ScriptedModel

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._answers: dict[str, bytes] = {}

    def answer(self, row) -> bytes:
        if row.request.request_id not in self._answers:
            self._answers[row.request.request_id] = self.model.answer(row.prompt)
        return self._answers[row.request.request_id]


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


def agent_server(directory: Path, monkeypatch: pytest.MonkeyPatch, template: str = TEMPLATE) -> AgentServer:
    """A server of a model with this chat template and a context that agents need."""
    model = ScriptedModel()
    monkeypatch.setattr(engine_factory, "EmulatedEngine", type("Scripted", (_Engine,), {"model": model}))
    config = model_config(
        directory, template,
        engine={"max_batch_size": 8, "num_pages": 2 * CONTEXT // 16},
        emulation={"tokens_per_s": 5000.0, "prefill_tokens_per_s": 1e7, "max_seq_len": CONTEXT},
    )  # fmt: skip
    return AgentServer(config, model)
