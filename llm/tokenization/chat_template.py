"""A checkpoint's chat template: Jinja in an immutable sandbox, with limits on work and on size.

Variables, filters and whitespace rules are those of transformers, whose templates these are.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm.errors import ConfigError, InvalidRequestError
from llm.tokenization.control_tokens import ascii_only

MAX_RENDERED_CHARS = 32 << 20
MAX_RENDER_CPU_S = 5.0
LIMIT_EXCEEDED = "chat_template_limit"
"""Code of the error for messages on which the template works too long or writes too much."""

_MAX_MESSAGE_CHARS = 300
_OPERATIONS_PER_CLOCK_READ = 256
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "chat_template", "documents"})


class ChatTemplate:
    """One compiled template. Rendering is thread-safe.

    Args:
        source: Jinja text.
        origin: the file it came from, for error messages.
        special_tokens: `bos_token`, `eos_token`, … as the template's variables; a request cannot change them.

    Attributes:
        source, origin: as given.

    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(self, source: str, *, origin: str, special_tokens: Mapping[str, str]) -> None:
        self.source, self.origin = source, origin
        self._special_tokens = dict(special_tokens)
        self._environment = _LimitedEnvironment()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{origin}: the chat template is not valid Jinja: {error}; fix or remove it") from error

    def reads(self, name: str) -> bool:
        """Whether it reads a variable of that name."""
        return name in find_undeclared_variables(self._environment.parse(self.source))

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """Text of the chat, control tokens included.

        Args:
            variables: the request's own, such as `enable_thinking`.

        Raises:
            InvalidRequestError: the template refuses the messages, cannot make sense of them, or passes a limit.
        """
        taken = sorted(set(variables) & (_RESERVED | self._special_tokens.keys()))
        if taken:
            raise InvalidRequestError(
                f"chat template variable {taken[0]!r} cannot be set by a request", param="chat_template_kwargs"
            )
        context = {**variables, **self._special_tokens}
        context |= {"messages": messages, "tools": tools, "documents": None}
        context["add_generation_prompt"] = add_generation_prompt
        try:
            with self._environment.budget:
                return self._join(self._template.generate(context))
        except _LimitExceededError as error:
            message = f"the chat template {error}; shorten the messages"
            raise InvalidRequestError(message, param="messages", code=LIMIT_EXCEEDED) from error
        except jinja2.TemplateError as error:
            raise InvalidRequestError(_shortened(error.message or "refused"), param="messages") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            message = _shortened(f"the chat template cannot use these messages: {error}")
            raise InvalidRequestError(message, param="messages") from error

    def _join(self, parts: Any) -> str:
        kept = []
        num_chars = 0
        for part in parts:
            num_chars += len(part)
            if num_chars > MAX_RENDERED_CHARS:
                raise _LimitExceededError(f"made more than {MAX_RENDERED_CHARS} characters")
            self._environment.budget.spend()
            kept.append(part)
        return "".join(kept)


class _LimitExceededError(Exception):
    """A template does too much; the message completes "the chat template …"."""


class _Budget(threading.local):
    """Processor time of the rendering that goes on in this thread. A context manager: entering starts it afresh."""

    def __init__(self) -> None:
        self._num_operations = 0
        self._deadline = float("inf")

    def __enter__(self) -> None:
        self._num_operations = 0
        self._deadline = time.thread_time() + MAX_RENDER_CPU_S

    def __exit__(self, *_: object) -> None:
        self._deadline = float("inf")

    def spend(self) -> None:
        """Count one operation."""
        self._num_operations += 1
        if self._num_operations % _OPERATIONS_PER_CLOCK_READ == 0 and time.thread_time() > self._deadline:
            raise _LimitExceededError(f"ran for more than {MAX_RENDER_CPU_S:g} s")


class _LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, with each call, look-up and operator counted against the budget and big products refused.

    Jinja itself limits `range` to 100,000 items, so a loop's work is bounded between two counted operations.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
        self.budget = _Budget()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.budget.spend()
        if operator == "*" and _repeated_size(left, right) > MAX_RENDERED_CHARS:
            raise _LimitExceededError(f"made more than {MAX_RENDERED_CHARS} characters")
        if operator == "**":
            raise jinja2.exceptions.SecurityError("the ** operator is not available to chat templates")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.spend()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.budget.spend()
        return super().call(context, obj, *args, **kwargs)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's part for training: its body, unchanged."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = CallBlock(self.call_method("_body"), [], [], body)
        block.set_lineno(line)
        return block

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return ascii_only(text) if ensure_ascii else text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # local time, as transformers has it


def _repeated_size(left: Any, right: Any) -> int:
    """Length of a repeated string or list; 0 for any other product."""
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(times, int):
            return len(value) * times
    return 0


def _shortened(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE_CHARS else message[:_MAX_MESSAGE_CHARS] + "…"
