"""A model that writes what a script says of its prompt, behind the real template, router and parsers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine, model_config

from deployments.config import AppConfig
from deployments.replica import engine_factory

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


def scripted_model(
    directory: Path, monkeypatch: pytest.MonkeyPatch, template: str = TEMPLATE
) -> tuple[AppConfig, ScriptedModel]:
    """A service of a model with this chat template and the context that agents need, and the model."""
    model = ScriptedModel()
    monkeypatch.setattr(engine_factory, "EmulatedEngine", type("Scripted", (_Engine,), {"model": model}))
    config = model_config(
        directory, template,
        engine={"max_batch_size": 8, "num_pages": 2 * CONTEXT // 16},
        emulation={"tokens_per_s": 5000.0, "prefill_tokens_per_s": 1e7, "max_seq_len": CONTEXT},
    )  # fmt: skip
    return config, model
