"""An engine that answers everything with a script, and checkpoints whose chat template knows tools or thoughts."""

import json
from pathlib import Path

import pytest
from in_process import DEMO

from deployments.config import AppConfig
from deployments.replica import engine_factory
from deployments.replica.emulated_engine import EmulatedEngine
from llm.serving.schemas import FinishReason, StepOutput, TokenLogprobs

END = 257
TOOL_TEMPLATE = (
    "{% if tools %}<tool_call>-style tools: {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINK_TEMPLATE = TOOL_TEMPLATE + "{% if enable_thinking is not false %}<think>\n{% else %}<think></think>{% endif %}"
LLAMA_TEMPLATE = TOOL_TEMPLATE.replace("<tool_call>", "").replace("</tool_call>", "") + "{# parameters #}"


class ScriptedEngine(EmulatedEngine):
    """Gives a script's bytes, then the end token. The demo checkpoint's first 256 tokens are the bytes."""

    script = b""

    def answer(self, row) -> bytes:
        return self.script

    def _advance(self, row) -> StepOutput:
        tokens = [*self.answer(row), END]
        token_id = tokens[min(row.num_output, len(tokens) - 1)]
        row.num_output += 1
        reason = FinishReason.STOP if token_id == END else None
        if reason is None and row.num_output >= row.request.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            del self._running[row.request.request_id]
            self.pool.release(row.pages)
        logprobs = (TokenLogprobs(token_id, -0.5, ()),) if row.request.logprobs is not None else None
        return StepOutput(
            row.request.request_id, (token_id,), logprobs=logprobs, finish_reason=reason,
            num_prompt_tokens=len(row.prompt), num_cached_tokens=row.num_cached,
        )  # fmt: skip


def use_script(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Have the engines made from now on answer with `text`."""
    engine = type("Scripted", (ScriptedEngine,), {"script": text.encode()})
    monkeypatch.setattr(engine_factory, "EmulatedEngine", engine)


def checkpoint(directory: Path, template: str) -> Path:
    """The demo checkpoint with another chat template."""
    directory.mkdir(exist_ok=True)
    for path in DEMO.iterdir():
        if path.name != "tokenizer_config.json":
            (directory / path.name).symlink_to(path)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return directory


def model_config(directory: Path, template: str, engine_kind: str = "emulated", **changes: object) -> AppConfig:
    """A service of such a checkpoint."""
    fields = {
        "model": str(checkpoint(directory / "model", template)),
        "served_model_name": "demo",
        "engine_kind": engine_kind,
        "engine": {"max_batch_size": 16, "num_pages": 2048},
        "emulation": {"tokens_per_s": 5000.0, "max_seq_len": 2048},
    }
    return AppConfig.model_validate({**fields, **changes})


def events_of(text: str) -> list[dict]:
    """The objects of a stream of server-sent events; it must end with `[DONE]`."""
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
