"""Options of the load tests, each described once, and what they come to."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from deployments.bench.client import Target
from deployments.bench.load import LoadSpec
from deployments.bench.prompts import TokenSource
from deployments.bench.records import parse_goodput
from deployments.bench.workload import (
    LengthRange,
    PlannedRequest,
    TraceFormat,
    random_workload,
    trace_workload,
    with_arrivals,
)

_DEFAULT_NUM_REQUESTS = 100
_WARM_UP_INDEX = 2**32  # prompts follow from the index: past every measured one
_DEFAULT_TOKEN_IDS = "0-31999"
_SERVER, _LOAD, _REQUESTS, _CLIENT, _RESULT = "Server", "Load", "Requests", "Client", "Result"


class EndpointKind(StrEnum):
    """Which of OpenAI's two APIs is asked."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def path(self) -> str:
        """The path below the API's base."""
        return "/chat/completions" if self is EndpointKind.CHAT else "/completions"


def _option(panel: str, description: str, **more: Any) -> Any:
    return typer.Option(help=description, rich_help_panel=panel, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchArguments:
    """The command line of a run: each field is the option of its name; see `takes_arguments`.

    Raises:
        ValueError: values that do not go together; the message says what to give.
    """

    url: Annotated[str, _option(_SERVER, "The API's base.")]
    model: Annotated[str, _option(_SERVER, "Name of the served model.")]
    endpoint: Annotated[EndpointKind, _option(_SERVER, "Which API.")] = EndpointKind.COMPLETIONS
    api_key_env: Annotated[str, _option(_SERVER, "Environment variable with the API key, if the server needs one.")] = (
        "OPENAI_API_KEY"
    )
    concurrency: Annotated[int | None, _option(_LOAD, "Closed loop: this many requests at once.", min=1)] = None
    rate: Annotated[float | None, _option(_LOAD, "Open loop: requests a second, however slow the answers are.")] = None
    burstiness: Annotated[
        float, _option(_LOAD, "Shape of the gaps with --rate: 1 Poisson, less in bursts, more evenly.")
    ] = 1.0
    trace: Annotated[
        Path | None, _option(_LOAD, "Open loop: arrivals and lengths of a trace.", exists=True, dir_okay=False)
    ] = None
    trace_format: Annotated[TraceFormat | None, _option(_LOAD, "Format of the trace.")] = None
    speed: Annotated[float, _option(_LOAD, "2 replays a trace in half its time.")] = 1.0
    num_requests: Annotated[
        int | None, _option(_LOAD, "Number of requests: by default 100, or all of a trace.", min=1, show_default=False)
    ] = None
    duration_s: Annotated[
        float | None, _option(_LOAD, "With a rate, instead of --num-requests: seconds of arrivals.")
    ] = None
    warmup: Annotated[int, _option(_LOAD, "Requests before the measurement; the first must succeed.", min=0)] = 1
    input_tokens: Annotated[str, _option(_REQUESTS, "Tokens of a prompt: 128, or a range such as 100-1024.")] = "512"
    output_tokens: Annotated[
        str, _option(_REQUESTS, "Most tokens of an answer (exactly so many with --ignore-eos).")
    ] = "128"
    max_input_tokens: Annotated[
        int | None, _option(_REQUESTS, "Longest prompt of a trace; longer ones are cut.", min=1)
    ] = None
    max_output_tokens: Annotated[
        int | None, _option(_REQUESTS, "Longest answer of a trace; longer ones are cut.", min=1)
    ] = None
    ignore_eos: Annotated[bool, _option(_REQUESTS, "Let answers continue to their full length.")] = False
    temperature: Annotated[float, _option(_REQUESTS, "Temperature of the sampling.", min=0)] = 0.0
    extra_body: Annotated[
        str | None, _option(_REQUESTS, "Further fields of each request, as JSON: '{\"top_k\": 1}'.")
    ] = None
    tokenizer: Annotated[
        Path | None, _option(_REQUESTS, "Folder with tokenizer.json: prompts are text of that many tokens, not ids.")
    ] = None
    token_ids: Annotated[str, _option(_REQUESTS, "Ids that prompts are drawn from without --tokenizer.")] = (
        _DEFAULT_TOKEN_IDS
    )
    seed: Annotated[
        int, _option(_REQUESTS, "Seed of prompts, lengths and arrivals. With a new one no prefix is cached.", min=0)
    ] = 0
    goodput: Annotated[
        str | None, _option(_RESULT, "Limits in ms that a good request keeps: ttft:500,tpot:25,e2el:9000.")
    ] = None
    label: Annotated[str | None, _option(_RESULT, "Name in tables and plots; the model's by default.")] = None
    save_requests: Annotated[bool, _option(_RESULT, "Keep every request's numbers in the result.")] = False
    processes: Annotated[int, _option(_CLIENT, "Client processes that share the load.", min=1)] = 1
    timeout_s: Annotated[float, _option(_CLIENT, "Longest time for one answer, in seconds.")] = 600.0

    def __post_init__(self) -> None:
        modes = {"--concurrency": self.concurrency, "--rate": self.rate, "--trace": self.trace}
        given = [name for name, value in modes.items() if value is not None]
        if len(given) != 1:
            chosen = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of --concurrency, --rate and --trace ({chosen} given)")
        for name in ("rate", "burstiness", "speed", "duration_s", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name.replace('_', '-')} {value:g}: must be above 0")
        if self.trace is not None and self.trace_format is None:
            raise ValueError("--trace: name its format with --trace-format mooncake or azure")
        if self.duration_s is not None and (self.rate is None or self.num_requests is not None):
            raise ValueError("--duration-s: only with --rate, and without --num-requests")
        if self.endpoint is EndpointKind.CHAT and self.tokenizer is None:
            raise ValueError(
                "--endpoint chat: give --tokenizer DIR, because a chat's prompt is text (or --endpoint completions)"
            )
        parse_goodput(self.goodput)
        self._options()

    @property
    def name(self) -> str:
        """The name in tables and plots."""
        return self.label or self.model

    @property
    def limits_ms(self) -> dict[str, float]:
        """The limits of goodput, in milliseconds by metric."""
        return parse_goodput(self.goodput)

    def as_json(self) -> dict[str, Any]:
        """The command line, for results. There is no secret in it: a key's variable is named, not read."""
        return {item.name: str(v) if isinstance(v := getattr(self, item.name), Path) else v for item in fields(self)}

    def requests(self) -> list[PlannedRequest]:
        """The requests to send.

        Raises:
            ValueError: the lengths or the trace cannot be read.
        """
        if self.trace is not None:
            assert self.trace_format is not None, "checked above"
            return trace_workload(
                self.trace, self.trace_format, speed=self.speed, num_requests=self.num_requests,
                max_input_tokens=self.max_input_tokens, max_output_tokens=self.max_output_tokens,
            )  # fmt: skip
        requests = self._random(self.num_requests or self._default_num_requests(), self.seed)
        return requests if self.rate is None else with_arrivals(requests, self.rate, self.burstiness, self.seed)

    def warm_up_requests(self) -> list[PlannedRequest]:
        """The requests that are sent first, with prompts that no measured request has."""
        planned = self.requests()[: self.warmup] if self.trace is not None else self._random(self.warmup, self.seed)
        return [
            PlannedRequest(_WARM_UP_INDEX + i, request.num_input_tokens, request.num_output_tokens)
            for i, request in enumerate(planned)
        ]

    def load(self, requests: list[PlannedRequest]) -> dict[str, Any]:
        """The load offered, for results: requests at once, or requests a second."""
        if self.concurrency is not None:
            return {"mode": "concurrency", "value": self.concurrency}
        if self.trace is None:
            return {"mode": "rate", "value": self.rate, "burstiness": self.burstiness}
        span = (requests[-1].arrival_s or 0.0) or 1.0
        name = f"{self.trace.name} at {self.speed:g}x"
        return {"mode": "trace", "value": round(len(requests) / span, 4), "name": name}

    def spec(self, requests: list[PlannedRequest]) -> LoadSpec:
        """The load as the client processes want it; looks the server up.

        Raises:
            TargetError: nothing answers at the URL.
            ValueError: the tokenizer or the ids cannot be used.
        """
        target = Target(self.url.rstrip("/"), self.endpoint.path, os.environ.get(self.api_key_env) or None)
        return LoadSpec(
            target=target,
            address=target.resolve(),
            timeout_s=self.timeout_s,
            source=self._source(),
            is_chat=self.endpoint is EndpointKind.CHAT,
            model=self.model,
            seed=self.seed,
            options=self._options(),
            requests=tuple(requests),
            concurrency=self.concurrency or 1,
        )

    def _default_num_requests(self) -> int:
        if self.rate is not None and self.duration_s is not None:
            return max(math.ceil(self.rate * self.duration_s), 1)
        return _DEFAULT_NUM_REQUESTS

    def _random(self, num: int, seed: int) -> list[PlannedRequest]:
        inputs = LengthRange.parse(self.input_tokens, "--input-tokens")
        return random_workload(num, inputs, LengthRange.parse(self.output_tokens, "--output-tokens"), seed)

    def _source(self) -> TokenSource:
        if self.tokenizer is not None:
            return TokenSource.words(self.tokenizer)
        low, _, high = self.token_ids.partition("-")
        if not (low.isdigit() and high.isdigit() and int(low) <= int(high)):
            raise ValueError(f"--token-ids {self.token_ids!r}: give a range such as {_DEFAULT_TOKEN_IDS}")
        return TokenSource.ids(int(low), int(high))

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"temperature": self.temperature}
        if self.ignore_eos:
            options["ignore_eos"] = True
        try:
            extra = json.loads(self.extra_body or "{}")
        except ValueError as error:
            raise ValueError(f"--extra-body: not JSON ({error})") from error
        if not isinstance(extra, dict):
            raise ValueError('--extra-body: give a JSON object, such as {"top_k": 1}')
        return {**options, **extra}


def takes_arguments(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of `BenchArguments` as options, before its own; it gets them as keyword arguments.

    A parameter of the command with a field's name is that field's option.

    Args:
        left_out: fields that the command sets itself.
    """

    def give(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(BenchArguments, include_extras=True)
        shared = [
            Parameter(
                item.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if item.default is MISSING else item.default,
                annotation=hints[item.name],
            )
            for item in fields(BenchArguments)
            if item.name not in left_out
        ]
        own = [
            parameter.replace(kind=Parameter.KEYWORD_ONLY)
            for name, parameter in signature(command).parameters.items()
            if name not in hints and parameter.kind is not Parameter.VAR_KEYWORD
        ]
        parameters = [*shared, *own]
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return give
