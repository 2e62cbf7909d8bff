"""Adapters by request through the kernels: the same tokens as the reference.

On a CPU the kernels run in Triton's interpreter, one by one, without graphs; on a GPU as they are.
"""

from pathlib import Path

import pytest
from test_graph_runner import (
    DEEPSEEK_V3,
    GEMMA_2,
    QWEN_3_5_MOE,
    create_engine,
    create_model,
    create_requests,
    run,
)

from benchmarks.random_adapter import write_random_adapter
from llm.checkpoint.adapter_digest import adapter_digest
from llm.models.decoder import DecoderModel
from llm.serving.schemas import AdapterRef


def write_adapters(model: DecoderModel, directory: Path) -> list[AdapterRef]:
    for rank in (2, 5):
        write_random_adapter(model.config, directory / str(rank), rank=rank, seed=rank, std=0.3, with_experts=True)
    paths = [directory / str(rank) for rank in (2, 5)]
    return [AdapterRef(name=path.name, path=str(path), digest=adapter_digest(path)) for path in paths]


@pytest.mark.parametrize(
    "shape",
    [{}, GEMMA_2, QWEN_3_5_MOE, DEEPSEEK_V3],
    ids=["llama", "gemma2", "qwen3.5 with experts", "deepseek v3"],
)
def test_tokens_equal_the_reference(tmp_path, shape):
    """Prompts in chunks beside decodes, more requests than rows and than slots, of rows with adapters and without.

    Routers and experts have adapters too."""
    model = create_model(**shape)
    first, second = write_adapters(model, tmp_path)
    requests = [
        request.model_copy(update={"adapter": adapter})
        for request, adapter in zip(create_requests(4), (first, None, second, first), strict=True)
    ]
    found, expected = (
        run(create_engine(model, backend, max_adapters=2, max_adapter_rank=8, adapter_experts=True), requests)
        for backend in ("triton", "reference")
    )
    assert found == expected
    base = run(create_engine(model, "reference"), [r.model_copy(update={"adapter": None}) for r in requests])
    assert [ours != theirs for ours, theirs in zip(found, base, strict=True)] == [True, False, True, True]
