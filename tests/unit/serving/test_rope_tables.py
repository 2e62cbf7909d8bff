"""How many positions a rotary embedding's table has, and that the angles are the same however many there are."""

import pytest
import torch
from small_engines import create_engine, create_model, create_requests

from llm.attention.rope import RotaryEmbedding
from llm.config import RopeScaling

CPU = torch.device("cpu")
LONG_CONTEXT = 1 << 20
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 8.0], "factor": 4.0}
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "yarn of the whole context": {"rope_type": "yarn", "factor": 4.0},
    "longrope": {**LONGROPE, "original_max_position_embeddings": 32},
    "scaled queries": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1,
    },
}  # fmt: skip


def create_rope(scaling: dict | None, max_seq_len: int = 1024) -> RotaryEmbedding:
    return RotaryEmbedding(4, max_seq_len, 1e4, None if scaling is None else RopeScaling(**scaling))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_shorter_context_has_the_first_rows_of_the_same_table(scaling):
    whole, served = create_rope(scaling), create_rope(scaling)
    served.fit_context(48)
    assert torch.equal(served.table(CPU), whole.table(CPU)[:, :48])
    scales = whole.query_scales(CPU)
    if scales is not None:
        assert torch.equal(served.query_scales(CPU), scales[:48])


def test_longrope_chooses_its_angles_by_the_context_and_not_by_the_table():
    scaling = {**LONGROPE, "original_max_position_embeddings": 32}
    rope, short = create_rope(scaling), create_rope({**scaling, "long_factor": LONGROPE["short_factor"]})
    rope.fit_context(32)
    assert torch.equal(rope.table(CPU), short.table(CPU)[:, :32])
    rope.reach(40)
    assert torch.equal(rope.table(CPU), short.table(CPU))


def test_an_engine_has_a_table_of_what_it_serves():
    """The table of a context of a million tokens would take half a gigabyte with heads of 128."""
    model = create_model(max_seq_len=LONG_CONTEXT)
    engine = create_engine(model, max_seq_len=96)
    results = engine.generate(create_requests(2), progress=False)
    assert all(result.error is None for result in results)
    assert [spec.rope.table(CPU).shape[1] for spec in model.attention_specs.values()] == [96, 96]


def test_engines_that_share_a_model_serve_their_own_contexts():
    model = create_model()
    requests = create_requests(4, max_new_tokens=50)
    longer, shorter = create_engine(model, max_seq_len=96), create_engine(model, max_seq_len=32)
    expected = create_engine(create_model()).generate(requests, progress=False)
    assert longer.generate(requests, progress=False) == expected
    assert shorter.generate(requests[:1], progress=False)[0].token_ids == expected[0].token_ids[:29]


def test_a_model_takes_its_whole_context_even_if_an_engine_serves_less():
    model, fresh = create_model(), create_model()
    create_engine(model, max_seq_len=16)
    token_ids = list(range(40))
    assert torch.equal(model(token_ids), fresh(token_ids))
