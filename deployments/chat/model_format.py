"""How a model writes calls and thoughts, as its configuration or its chat template says."""

from dataclasses import dataclass

from deployments.config import ReasoningParserName, ToolParserName
from llm.tokenization.hf_tokenizer import HFTokenizer

_TAIL_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """What to look for in a model's text.

    Attributes:
        tool_format: `hermes` or `llama3`; None where the model can call no tools.
        may_reason: answers may begin with `<think>`.
    """

    tool_format: str | None
    may_reason: bool


def find_format(
    tokenizer: HFTokenizer, tool_parser: ToolParserName, reasoning_parser: ReasoningParserName
) -> ModelFormat:
    """The model's format, where it is `auto` by what its chat templates hold."""
    templates = tokenizer.template_sources
    tool_format: str | None = str(tool_parser)
    if tool_parser is ToolParserName.NONE or (tool_parser is ToolParserName.AUTO and "tools" not in templates):
        tool_format = None
    elif tool_parser is ToolParserName.AUTO:
        is_llama = "<tool_call>" not in templates and ("python_tag" in templates or "parameters" in templates)
        tool_format = str(ToolParserName.LLAMA3 if is_llama else ToolParserName.HERMES)
    may_reason = reasoning_parser is ReasoningParserName.THINK
    if reasoning_parser is ReasoningParserName.AUTO:
        may_reason = "</think>" in templates
    return ModelFormat(tool_format, may_reason)


def opens_reasoning(tokenizer: HFTokenizer, prompt_ids: list[int]) -> bool:
    """Whether a prompt ends with `<think>`, so that the answer begins with thoughts."""
    return tokenizer.decode(prompt_ids[-_TAIL_TOKENS:]).rstrip().endswith("<think>")
