"""SmolLM2-135M-Instruct: the same text and the same probabilities as transformers', in float32."""

import math
from typing import NamedTuple

import pytest
import torch
from real_texts import ODD_TEXTS, PARAGRAPH, QUESTIONS
from transformers import PreTrainedModel

from deployments.chat.pair_prompts import DEFAULT_INSTRUCTION, DEFAULT_TEMPLATE
from llm.config import EngineConfig
from llm.serving.engine import ContinuousBatchingEngine
from llm.serving.schemas import GenerationRequest

NUM_TOKENS = 8
NUM_TOKENS_ALONE = 4
TIE = 1e-3
"""Two logits this close may come out in either order: float32 sums differ by about a tenth of it."""


KNOWN_IDS = [
    [216, 827, 2899, 5600, 28, 253, 10147, 197, 397, 3204, 1116, 198, 16347, 282, 601, 2738],
    [3546, 46494, 37366, 28, 216, 9175, 14714, 9382, 39511, 7872, 24958, 28, 17097, 241, 115, 40993, 179, 120, 248, 28,
     12335, 134, 27011, 30658, 16525, 44757, 37189],
    [1604, 275, 24, 104, 727, 472, 1003, 7353, 81, 1539, 933, 104, 28, 731, 104, 28852, 216, 907, 10907, 47, 198],
    [46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 11510, 1703, 32543, 30298],
]  # fmt: skip
"""Of `ODD_TEXTS`, as transformers 5.24 reads the tokenizer out of the same file, which takes it long."""
KNOWN_CHAT = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
    1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
]  # fmt: skip
"""Of the first question, from the same source."""


class Models(NamedTuple):
    ours: ContinuousBatchingEngine
    theirs: PreTrainedModel


@pytest.fixture(scope="module")
def models(real_model, model_of_transformers) -> Models:
    """The engine reads the file itself; transformers gets the same weights, unpacked."""
    path = real_model("smollm2")
    config = EngineConfig(cpu_pool_bytes=256 << 20, max_seq_len=1024)
    ours = ContinuousBatchingEngine.from_pretrained(path, config=config, dtype=torch.float32, progress=False)
    return Models(ours, model_of_transformers(path))


def greedy(engine: ContinuousBatchingEngine, question: str, max_new_tokens: int) -> GenerationRequest:
    assert engine.tokenizer is not None
    chat = engine.tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return GenerationRequest(prompt_token_ids=tuple(chat), max_new_tokens=max_new_tokens, temperature=0)


def logits_of_answers(model: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> list[torch.Tensor]:
    """The logits from which each token of each answer is drawn, given the tokens before it: `(tokens, vocabulary)`."""
    texts = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    is_real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    hidden = model.model(ids, attention_mask=is_real, use_cache=False).last_hidden_state
    return [
        model.lm_head(states[len(prompt) - 1 : len(prompt) + len(answer) - 1])
        for states, prompt, answer in zip(hidden, prompts, answers, strict=True)
    ]


def assert_greedy(answer: list[int], logits: torch.Tensor, what: str) -> None:
    """Each token is the likeliest one, or as good as tied with it."""
    for position, (token_id, row) in enumerate(zip(answer, logits[: len(answer)], strict=True)):
        margin = (row.max() - row[token_id]).item()
        assert margin < TIE, f"{what}, token {position}: {token_id} is {margin:.5f} below {row.argmax()}"


@torch.inference_mode()
def test_greedy_text_is_transformers_alone_and_in_a_batch(models):
    """Given the tokens before it, each token of ours is the one that transformers would draw."""
    asked = [greedy(models.ours, question, NUM_TOKENS) for question in QUESTIONS]
    prompts = [list(request.prompt_token_ids) for request in asked]
    batched = [list(result.token_ids) for result in models.ours.generate(asked, progress=False)]
    logits = logits_of_answers(models.theirs, prompts, batched)
    for question, answer, rows in zip(QUESTIONS, batched, logits, strict=True):
        assert_greedy(answer, rows, question)
    for question, answer, rows in zip(QUESTIONS, batched, logits, strict=True):
        (result,) = models.ours.generate([greedy(models.ours, question, NUM_TOKENS_ALONE)], progress=False)
        alone = list(result.token_ids)
        assert len(alone) == min(len(answer), NUM_TOKENS_ALONE)
        # Behind a tie that came out in another order the texts go different ways.
        ways = [i for i, pair in enumerate(zip(alone, answer, strict=False)) if len(set(pair)) > 1]
        assert_greedy(alone[: ways[0] + 1] if ways else alone, rows, f"{question} (alone)")
    texts = [models.ours.tokenizer.decode(answer) for answer in batched]
    assert "Paris" in texts[0]


@torch.inference_mode()
def test_perplexity_of_a_paragraph_is_transformers(models):
    """Each token's log probability within 1e-4, and a perplexity that only whole weights give."""
    ids = models.ours.tokenizer.encode(PARAGRAPH)
    rows = models.theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    request = GenerationRequest(prompt_token_ids=tuple(ids), max_new_tokens=0, prompt_logprobs=1)
    (result,) = models.ours.generate([request], progress=False)
    found = torch.tensor([entry.logprob for entry in result.prompt_logprobs])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    perplexity = math.exp(-found.mean())
    assert perplexity == pytest.approx(math.exp(-expected.mean()), abs=1e-4)
    assert perplexity < 30


def test_tokens_of_texts_and_chats_are_known(models):
    """Numbers are cut into digits, as SmolLM2's own tokenizer does."""
    tokenizer = models.ours.tokenizer
    for text, ids in zip(ODD_TEXTS, KNOWN_IDS, strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}]) == KNOWN_CHAT
    assert [tokenizer.token_text(i) for i in tokenizer.encode("In 1962")] == ["In", " ", "1", "9", "6", "2"]


@torch.inference_mode()
def test_scores_of_yes_and_no_and_vectors_are_transformers(models):
    """In Qwen3-Reranker's prompt, whose tokens this model has too, wherever yes and no stand among all tokens."""
    ours, theirs = models
    template = ours.tokenizer.new_template(DEFAULT_TEMPLATE, "the prompt")
    pair = tuple(ours.tokenizer.token_id(word) for word in ("yes", "no"))
    query = {"role": "query", "content": QUESTIONS[0]}
    for document in (PARAGRAPH, "Paris is the capital of France.", "no"):
        turns = [query, {"role": "document", "content": document}]
        chat = ours.tokenizer.render(template, turns, {"instruction": DEFAULT_INSTRUCTION})
        ids = tuple(ours.tokenizer.encode_chat(chat))
        requests = [
            GenerationRequest(prompt_token_ids=ids, max_new_tokens=0, allowed_token_ids=pair, scores_allowed=True),
            GenerationRequest(prompt_token_ids=ids, pooling="last"),
            GenerationRequest(prompt_token_ids=ids, pooling="mean"),
        ]
        results = ours.generate(requests, progress=False)
        found = [torch.frombuffer(bytearray(result.vector), dtype=torch.float32) for result in results]
        states = theirs.model(torch.tensor([ids])).last_hidden_state[0]
        expected = theirs.lm_head(states[-1])[list(pair)].softmax(-1)
        torch.testing.assert_close(found[0].softmax(-1), expected, atol=1e-4, rtol=0)
        for vector, state in zip(found[1:], (states[-1], states.mean(0)), strict=True):
            torch.testing.assert_close(vector, state / state.norm(), atol=1e-4, rtol=0)
