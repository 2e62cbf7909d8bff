"""`docs/api.md` names every endpoint and every field there is, and tests that exist."""

import ast
import re
from pathlib import Path

import pytest
from in_process import ServiceFactory
from pydantic import BaseModel

from deployments.api.anthropic.schemas import MessagesRequest
from deployments.api.classification import ClassifyRequest
from deployments.api.openai.embeddings import EmbeddingsRequest
from deployments.api.openai.response_requests import ResponsesRequest
from deployments.api.pooling import PoolingRequest
from deployments.chat.requests import ChatRequest, CompletionRequest

TESTS = Path(__file__).parents[2]
TEXT = (TESTS.parent / "docs" / "api.md").read_text()
COMPARISON = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.partition("## Beside other servers")[2].splitlines()
    if line.startswith("|")
]


async def test_every_endpoint_is_there(make_service: ServiceFactory):
    service = await make_service()
    named = {path.replace(":path", "") for path in re.findall(r"`(?:GET|POST|DELETE) (/[^`]*)`", TEXT)}
    served = {route.path.replace(":path", "") for route in service.api.routes}
    assert served == named


@pytest.mark.parametrize(
    "model",
    [
        ChatRequest,
        CompletionRequest,
        ResponsesRequest,
        MessagesRequest,
        EmbeddingsRequest,
        ClassifyRequest,
        PoolingRequest,
    ],
)
def test_every_field_is_there(model: type[BaseModel]):
    sections = {"ChatRequest": "Chats", "CompletionRequest": "Completions", "ResponsesRequest": "Responses",
                "MessagesRequest": "Messages", "EmbeddingsRequest": "Embeddings",
                "ClassifyRequest": "Classify", "PoolingRequest": "Pooling"}  # fmt: skip
    section = TEXT.partition(f"\n## {sections[model.__name__]}\n")[2].partition("\n## ")[0]
    others = {CompletionRequest: "Chats", PoolingRequest: "Embeddings"}
    if model in others:
        section += TEXT.partition(f"\n## {others[model]}\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert set(model.model_fields) <= named


def test_each_tick_of_ours_has_a_test():
    header, _, *rows = COMPARISON
    assert header[5:] == ["Rayline", "its test"]
    assert len(rows) > 20
    for row in rows:
        assert len(row) == len(header), row
        assert all(re.fullmatch("[✓\u2013]?( [¹²³])?", cell) for cell in row[1:6]), row
        assert (row[5] == "✓") == bool(row[6]), row
        if row[6]:
            path, _, name = row[6].strip("`").partition("::")
            tree = ast.parse((TESTS / path).read_text())
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert name in names, row
