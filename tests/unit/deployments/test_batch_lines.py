"""Lines of a batch's file: which are right, and what is said about those that are not."""

import json
from typing import Any

import pytest
from hypothesis import given, strategies

from deployments.batches import input_lines
from deployments.batches.input_lines import MAX_FAULTS, InputLines, request_of, scan
from deployments.batches.line_usage import TokenUsage, usage_of

URL = "/v1/completions"


def scanned(data: bytes, **bounds: int) -> InputLines:
    bounds = {"max_lines": 1000, "max_body_bytes": 10_000, **bounds}
    return scan(lambda start, end: data[start:end], len(data), url=URL, **bounds)


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    value = {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"prompt": "x"}, **changes}
    return json.dumps({name: item for name, item in value.items() if item is not ...}).encode()


def test_lines_are_found_in_order_whatever_ends_them():
    data = b"\xef\xbb\xbf" + line("a") + b"\r\n\n" + line("b", extra=1) + b"\n  \n" + line("\u00e9\n") + b"\n"
    found = scanned(data)
    assert found.faults == []
    assert [entry.custom_id for entry in found.lines] == ["a", "b", "\u00e9\n"]
    for entry in found.lines:
        request = request_of(data[entry.start : entry.end])
        assert json.loads(request.body) == {"prompt": "x"}
    assert found.only_model is None
    assert scanned(line("a")).lines == [input_lines.InputLine("a", 0, len(line("a")))]


def test_the_model_of_a_batch_is_the_one_that_all_its_lines_name():
    one, other, none = {"model": "one"}, {"model": "other"}, {"prompt": "x"}

    def only(*bodies: dict) -> str | None:
        return scanned(b"\n".join(line(str(n), body=body) for n, body in enumerate(bodies))).only_model

    assert only(one, one) == "one"
    assert only(one, other) is only(one, none) is only(none, none) is None


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        ({"usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12,
                    "prompt_tokens_details": {"cached_tokens": 4},
                    "completion_tokens_details": {"reasoning_tokens": 3}}}, (7, 4, 5, 3)),
        ({"usage": {"input_tokens": 7, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 4, "other": 1},
                    "output_tokens_details": {"reasoning_tokens": 3}}}, (7, 4, 5, 3)),
        ({"usage": {"prompt_tokens": 7, "total_tokens": 7}}, (7, 0, 0, 0)),
        ({"usage": None}, (0, 0, 0, 0)),
        ({"error": {"message": "no"}}, (0, 0, 0, 0)),
        ({"usage": {"prompt_tokens": "many"}}, (0, 0, 0, 0)),
        ("not an object", (0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_usage_is_what_an_answer_says(body: Any, usage: tuple[int, ...]):
    assert usage_of(json.dumps(body).encode()) == TokenUsage(*usage)
    assert usage_of(b"\xff{") == TokenUsage()


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        (b"\xff" + line(), "invalid_encoding", None),
        (line().replace(b'"x"', b'"\xc3"'), "invalid_encoding", None),
        (b"{", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"[" * 100_000, "line_too_long", None),
        (b"[" * 8000, "invalid_json_line", None),
        (line(body={"prompt": "x" * 20_000}), "line_too_long", None),
        (line("b"), "duplicate_custom_id", "custom_id"),
        (line(...), "missing_required_parameter", "custom_id"),
        (line(7), "invalid_type", "custom_id"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("y" * 513), "invalid_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(method=...), "missing_required_parameter", "method"),
        (line(url="/v1/chat/completions"), "invalid_url", "url"),
        (line(body=...), "missing_required_parameter", "body"),
        (line(body="x"), "invalid_type", "body"),
        (line(body=None), "invalid_type", "body"),
        (line(body={"stream": True}), "invalid_request", "body.stream"),
        (line(body={"stream": "yes"}), "invalid_type", "body"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(wrong: bytes, code: str, param: str | None):
    found = scanned(b"\n".join([line("b"), b"", wrong, line("c")]))
    (fault,) = found.faults
    assert (fault.code, fault.line, fault.param) == (code, 3, param)
    assert [entry.custom_id for entry in found.lines] == ["b", "c"]


def test_a_file_without_lines_and_one_with_too_many():
    for data in (b"", b"\n \n\r\n", b"\xef\xbb\xbf"):
        assert [fault.code for fault in scanned(data).faults] == ["empty_file"]
    many = b"\n".join(line(str(number)) for number in range(11))
    assert scanned(many, max_lines=11).faults == []
    (fault,) = scanned(many, max_lines=10).faults
    assert (fault.code, fault.line) == ("too_many_lines", 11)


def test_faults_are_listed_up_to_a_bound():
    found = scanned(b"\n".join([b"{"] * 1000))
    assert [fault.line for fault in found.faults] == list(range(1, MAX_FAULTS + 1))


@given(
    strategies.lists(strategies.sampled_from([0, 1, 5, 20, 21, 60, 200]), max_size=20),
    strategies.integers(1, 40), strategies.booleans(),
)  # fmt: skip
def test_lines_are_split_alike_wherever_the_pieces_end(lengths: list[int], chunk: int, ends: bool):
    """Whatever part of the file is read at a time, the lines are those of `split`, and too long ones are left out."""
    lines = [bytes([97 + i % 26]) * length for i, length in enumerate(lengths)]
    data = b"\n".join(lines) + (b"\n" if ends else b"")
    wanted, position = [], 0
    for one in data.split(b"\n"):
        wanted.append((position, one if len(one) <= 20 else None))
        position += len(one) + 1
    if not wanted[-1][1] and wanted[-1][1] is not None:
        wanted.pop()
    old = input_lines._CHUNK_BYTES
    input_lines._CHUNK_BYTES = chunk
    try:
        found = list(input_lines._split(lambda start, end: data[start:end], len(data), 20))
    finally:
        input_lines._CHUNK_BYTES = old
    assert found == wanted
