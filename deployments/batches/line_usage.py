"""`TokenUsage`: the tokens that lines of a batch have used, as their answers say."""

import msgspec


class TokenUsage(msgspec.Struct, array_like=True, frozen=True):
    """Tokens of one line or of several.

    Attributes:
        input_tokens: of prompts.
        cached_tokens: how many of those came from the prefix cache.
        output_tokens: of answers.
        reasoning_tokens: how many of those were reasoning.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def plus(self, other: "TokenUsage") -> "TokenUsage":
        """The sum."""
        return TokenUsage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


class _InputDetails(msgspec.Struct):
    cached_tokens: int = 0


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    """The `usage` of an answer: `/v1/responses` has other names than the other paths."""

    prompt_tokens: int = 0
    prompt_tokens_details: _InputDetails | None = None
    completion_tokens: int = 0
    completion_tokens_details: _OutputDetails | None = None
    input_tokens: int = 0
    input_tokens_details: _InputDetails | None = None
    output_tokens: int = 0
    output_tokens_details: _OutputDetails | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Answer).decode


def usage_of(body: bytes) -> TokenUsage:
    """The tokens of a line's answer; none if the answer, such as an error, does not say."""
    try:
        usage = _decode(body).usage
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        usage = None
    if usage is None:
        return TokenUsage()
    inputs = usage.prompt_tokens_details or usage.input_tokens_details or _InputDetails()
    outputs = usage.completion_tokens_details or usage.output_tokens_details or _OutputDetails()
    return TokenUsage(
        usage.prompt_tokens or usage.input_tokens,
        inputs.cached_tokens,
        usage.completion_tokens or usage.output_tokens,
        outputs.reasoning_tokens,
    )
