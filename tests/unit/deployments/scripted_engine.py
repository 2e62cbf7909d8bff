"""An engine that answers everything with a script, and checkpoints whose chat template knows tools or thoughts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
from in_process import DEMO

from deployments.config import AppConfig
from deployments.replica import engine_factory
from deployments.replica.emulated_engine import EmulatedEngine
from llm.sampling.grammar import GrammarCompiler
from llm.serving.schemas import FinishReason, GenerationRequest, Grammar, StepOutput, TokenLogprobs
from llm.tokenization.hf_tokenizer import HFTokenizer

END = 257
_TURNS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}OPEN{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}CLOSE{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOL_TEMPLATE = (
    """{% if tools %}Write <tool_call>{"name": ..., "arguments": ...}</tool_call>: {{ tools | tojson }}\n{% endif %}"""
    + _TURNS.replace("OPEN", "<tool_call>").replace("CLOSE", "</tool_call>")
)
THINK_TEMPLATE = TOOL_TEMPLATE + "{% if enable_thinking is not false %}<think>\n{% else %}<think></think>{% endif %}"
LLAMA_TEMPLATE = (
    """{% if tools %}Write {"name": function name, "parameters": its arguments}: {{ tools | tojson }}\n{% endif %}"""
    + _TURNS.replace("OPEN", "").replace("CLOSE", "")
)


class ScriptedEngine(EmulatedEngine):
    """Gives a script's tokens, then the end token. The demo checkpoint's first 256 tokens are the bytes.

    Where a grammar binds the answer and the script does not fit it, the answer is `misfit`: no engine could give the
    script.
    """

    script: Sequence[int] = b""
    misfit = b"(does not fit the grammar)"
    grammars: ClassVar[dict[str, Grammar | None]] = {}

    def add_request(self, request: GenerationRequest) -> str:
        self.grammars[request.request_id] = request.grammar
        return super().add_request(request.model_copy(update={"grammar": None}))

    def answer(self, row) -> Sequence[int]:
        return self.script if fits(self.grammars[row.request.request_id], self.script) else self.misfit

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
        logprobs = (TokenLogprobs(token_id, -float(row.num_output), ()),) if row.request.logprobs is not None else None
        return StepOutput(
            row.request.request_id, (token_id,), logprobs=logprobs, finish_reason=reason,
            num_prompt_tokens=len(row.prompt), num_cached_tokens=row.num_cached,
        )  # fmt: skip


_COMPILERS: dict[Path, GrammarCompiler] = {}
"""Of the checkpoint that was made last."""


def fits(grammar: Grammar | None, script: Sequence[int]) -> bool:
    """Whether a grammar allows a script as a whole."""
    if grammar is None:
        return True
    (compiler,) = _COMPILERS.values()
    matcher = compiler.compile(grammar)
    return matcher.validate_tokens(list(script)) == len(script) and (
        matcher.consume_tokens(list(script)) and matcher.is_accepting()
    )


def use_script(monkeypatch: pytest.MonkeyPatch, script: str | Sequence[int]) -> None:
    """Have the engines made from now on answer with a text, or with these tokens."""
    tokens = script.encode() if isinstance(script, str) else script
    engine = type("Scripted", (ScriptedEngine,), {"script": tokens})
    monkeypatch.setattr(engine_factory, "EmulatedEngine", engine)


def checkpoint(directory: Path, template: str, special_tokens: Sequence[str] = ()) -> Path:
    """The demo checkpoint with another chat template.

    Args:
        special_tokens: up to two, which get the ids 262 and 263.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in DEMO.iterdir():
        if path.name not in ("tokenizer_config.json", "tokenizer.json"):
            (directory / path.name).symlink_to(path)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    definition = (DEMO / "tokenizer.json").read_text()
    for i, token in enumerate(special_tokens):
        definition = definition.replace(f"<|reserved_{i}|>", token)
    (directory / "tokenizer.json").write_text(definition)
    _COMPILERS.clear()
    _COMPILERS[directory] = GrammarCompiler(HFTokenizer.from_pretrained(directory))
    return directory


def model_config(
    directory: Path,
    template: str,
    engine_kind: str = "emulated",
    special_tokens: Sequence[str] = (),
    **changes: object,
) -> AppConfig:
    """A service of such a checkpoint."""
    fields = {
        "model": str(checkpoint(directory / "model", template, special_tokens)),
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
