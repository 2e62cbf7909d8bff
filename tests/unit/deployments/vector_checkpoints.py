"""Small random Qwen3 checkpoints that are for vectors, scores or labels, and what transformers makes of them."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from deployments.config import AppConfig

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN = 64
_WORDS = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CORPUS = ["yes no yes no", "the capital of China is Beijing", "gravity is a force that attracts two bodies"] * 5
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
QUERIES = ["What is the capital of China?", "Explain gravity"]
DOCUMENTS = [
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects.",
    'Émile said: "no"\n\n  — 東京 is no answer  ',
]


@cache
def definition(ending: str | None = None) -> str:
    """A tokenizer like Qwen's, with words for `yes` and `no`.

    Args:
        ending: the token that its post-processor puts behind each text.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(CONTROL)
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    assert {"yes", "no"} <= tokenizer.get_vocab().keys()
    tokenizer.add_tokens(["<think>", "</think>"])
    if ending is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {ending}", special_tokens=[(ending, tokenizer.token_to_id(ending))]
        )
    return str(tokenizer.to_str())


def make_checkpoint(
    directory: Path,
    files: Mapping[str, object] | None = None,
    *,
    ending: str | None = None,
    labels: Sequence[str] = (),
    **config: Any,
) -> Path:
    """Save a checkpoint.

    Args:
        files: content of further JSON files, by their paths in it.
        labels: those of a classifier.
        config: changes to its config.json.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(definition(ending))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    torch.manual_seed(5)
    shape = Qwen3Config(
        vocab_size=len(Tokenizer.from_str(definition()).get_vocab()), hidden_size=HIDDEN, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    if labels:
        shape.id2label, shape.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
        shape.pad_token_id = 0
        Qwen3ForSequenceClassification(shape).save_pretrained(directory)
    else:
        Qwen3ForCausalLM(shape).save_pretrained(directory)
    for name, content in (files or {}).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    if config:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def embedder(pooling: Mapping[str, object], *more: str, **others: object) -> dict[str, object]:
    """Files of sentence-transformers for a model of vectors.

    Args:
        pooling: content of `1_Pooling/config.json`.
        more: kinds of further modules.
        others: content of `config_sentence_transformers.json`.
    """
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    return {"modules.json": modules, "1_Pooling/config.json": pooling, "config_sentence_transformers.json": others}


def reranker() -> dict[str, object]:
    """Files of sentence-transformers 5.4 for a cross-encoder by yes and no."""
    ids = Tokenizer.from_str(definition())
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_LogitScore",
         "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"},
    ]  # fmt: skip
    scores = {"true_token_id": ids.token_to_id("yes"), "false_token_id": ids.token_to_id("no")}
    return {"modules.json": modules, "1_LogitScore/config.json": scores}


def service_config(directory: Path, **changes: object) -> AppConfig:
    fields = {"model": str(directory), "served_model_name": "demo", "dtype": "float32", "device": "cpu"}
    engine = {"max_batch_size": 8, "num_pages": 512, "max_tokens_per_step": 256}
    return AppConfig.model_validate({**fields, "engine": engine, **changes})


class LabelReference:
    """A classifier as transformers runs it."""

    def __init__(self, directory: Path) -> None:
        self.model = Qwen3ForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Of a prompt's labels."""
        return self.model(torch.tensor([list(ids)])).logits[0]

    def of_text(self, text: str) -> torch.Tensor:
        """The logits of a text's labels."""
        return self.logits(self.tokenizer.encode(text))

    def of_pair(self, query: str, document: str) -> torch.Tensor:
        """The logits of the labels of two texts that the tokenizer joins, as sentence-transformers has them."""
        return self.logits(self.tokenizer(query, document)["input_ids"])


class Reference:
    """The checkpoint as transformers runs it."""

    def __init__(self, directory: Path) -> None:
        self.model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))

    def yes_scores(self, pairs: Sequence[tuple[str, str]], instruction: str = INSTRUCTION) -> list[float]:
        """By the code on Qwen3-Reranker's model card: three pieces of tokens, and a softmax over two logits."""
        prefix = self.tokenizer.encode(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
            add_special_tokens=False,
        )
        suffix = self.tokenizer.encode(
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", add_special_tokens=False
        )
        scores = []
        for query, document in pairs:
            text = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
            ids = [*prefix, *self.tokenizer.encode(text, add_special_tokens=False), *suffix]
            scores.append(self.yes_probability(ids))
        return scores

    @torch.inference_mode()
    def yes_probability(self, ids: Sequence[int]) -> float:
        """How likely "yes" is against "no" after these tokens."""
        yes, no = (self.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        logits = self.model(torch.tensor([list(ids)])).logits[0, -1]
        return float(logits[[no, yes]].log_softmax(0)[1].exp())

    @torch.inference_mode()
    def vector(self, text: str, pooling: str = "last", size: int | None = None) -> torch.Tensor:
        """As sentence-transformers makes it: pooled, cut, normalized."""
        ids = torch.tensor([self.tokenizer.encode(text)])
        states = self.model.model(ids).last_hidden_state[0]
        vector = (states.mean(0) if pooling == "mean" else states[-1])[:size]
        return vector / vector.norm()
