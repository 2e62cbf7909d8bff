"""Models cut over ranks, all of which run in threads of this process, against the same model in one piece."""

from pathlib import Path

import pytest
import torch
from thread_ranks import ThreadExchange, run_ranks

from llm.attention.dense import DenseContext
from llm.checkpoint.adapter import load_lora
from llm.checkpoint.loading import load_decoder
from llm.core.partition import Partition
from llm.models.decoder import DecoderModel


def prompt(vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))


def logits_of(model: DecoderModel) -> torch.Tensor:
    token_ids = prompt(190)
    positions = torch.arange(token_ids.shape[1])
    return model.logits(model.hidden_states(token_ids, positions, DenseContext()))


def check_cut(directory: Path, size: int, adapter: Path | None = None, *, by_expert: bool = False) -> None:
    """Ranks give the whole model's logits, all of them, and no two of them hold the same weight of a product."""

    def load(partition: Partition) -> DecoderModel:
        model = load_decoder(directory, partition=partition, progress=False)
        if adapter is not None:
            load_lora(model, adapter)
            model.merge_lora()
        return model

    def run(partition: Partition, exchange: ThreadExchange) -> torch.Tensor:
        model = load(partition)
        model.exchange = exchange
        return logits_of(model)

    whole = load(Partition())
    with torch.inference_mode():
        expected = logits_of(whole)
    for logits in run_ranks(size, run, by_expert=by_expert):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


FAMILIES = [
    "gemma2", "gemma3", "gemma3_text_half", "gpt_oss", "llama", "llama_mha", "llama_mqa_biases", "ministral",
    "ministral3", "mistral", "mistral3_text_half", "mixtral", "phi3", "phi3_partial", "qwen2", "qwen2_tied", "qwen3",
    "qwen3_5", "qwen3_5_images", "qwen3_moe", "qwen3_moe_dense",
]  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_two_ranks_give_the_logits_of_the_whole_model(checkpoints, kind):
    check_cut(checkpoints(kind)[0], 2)
