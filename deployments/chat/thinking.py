"""How a request says whether the model should think first, and how long: each client in the words of the server that
it was made for."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from deployments.chat.errors import invalid
from deployments.chat.wire_model import NoEffect, WireModel

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_SWITCHES = {"enabled": True, "disabled": False}


def _as_switch(value: Any) -> Any:
    """Whether to think; None for an object whose type leaves it to the model, such as `adaptive`."""
    return _SWITCHES.get(str(value.get("type"))) if isinstance(value, dict) else value


class ReasoningOptions(WireModel):
    """Whether and how long to think."""

    effort: Effort | None = None
    enabled: bool | None = None
    max_tokens: NoEffect = None
    exclude: NoEffect = None
    summary: NoEffect = None


def _options_or_nothing(value: Any) -> Any:
    return value if isinstance(value, (dict, ReasoningOptions)) else None


class ThinkingFields(WireModel):
    """Fields about thinking. They set variables of the chat template, which decides what becomes of them."""

    reasoning_effort: Effort | None = None
    """Given to the chat template, as `reasoning_effort`; `none` also turns thinking off."""
    enable_thinking: bool | None = None
    """Extension, as in Alibaba's API. Turns thinking on or off, where the chat template can: it sets the template's
    variables `enable_thinking` and `thinking`."""
    thinking: Annotated[bool | None, BeforeValidator(_as_switch, json_schema_input_type=bool | dict[str, Any])] = None
    """Extension, as in DeepSeek's API. The same as `{"type": "enabled"}` or `{"type": "disabled"}`."""
    reasoning: Annotated[
        ReasoningOptions | None,
        BeforeValidator(_options_or_nothing, json_schema_input_type=ReasoningOptions | None),
    ] = None
    """Extension, as in OpenRouter's API. `effort` is another name of `reasoning_effort`, `enabled` of
    `enable_thinking`."""

    @property
    def has_thinking_fields(self) -> bool:
        """Whether any of them is given."""
        return any(getattr(self, name) is not None for name in ThinkingFields.model_fields)

    def thinking_variables(self) -> dict[str, Any]:
        """The chat template's variables.

        Raises:
            APIError: a 400; the fields contradict each other.
        """
        options = self.reasoning or ReasoningOptions()
        efforts = {"reasoning_effort": self.reasoning_effort, "reasoning.effort": options.effort}
        effort = _agreed(efforts)
        is_on = _agreed({
            "reasoning_effort": False if effort == "none" else None,
            "enable_thinking": self.enable_thinking,
            "thinking": self.thinking,
            "reasoning.enabled": options.enabled,
        })  # fmt: skip
        variables = {"reasoning_effort": effort} if effort is not None else {}
        return variables if is_on is None else {**variables, "enable_thinking": is_on, "thinking": is_on}


def _agreed(given: dict[str, Any]) -> Any:
    """The one value that fields have that say the same; None if none is given.

    Raises:
        APIError: a 400; they differ.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if len(set(values.values())) > 1:
        raise invalid(f"{' and '.join(values)} differ; give one of them", next(iter(values)))
    return next(iter(values.values()), None)
