"""The demo checkpoint as it ships: its size, its tokenizer, its chat template, and an answer through transformers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.conversations import training_rows
from demo.tokenizer import ASSISTANT, BEGIN, END, SPECIAL_IDS, SPECIAL_TOKENS, USER, VOCAB_SIZE, build_tokenizer
from demo.train import answer_mask

CHECKPOINT = Path(__file__).parents[2] / "configs" / "demo"
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def test_checkpoint_is_at_most_ten_megabytes() -> None:
    """All the files together."""
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 10_000_000


def test_shipped_tokenizer_is_the_one_the_code_builds() -> None:
    """Training and serving agree on every id."""
    shipped = (CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8")
    assert type(TOKENIZER).from_str(shipped).to_str() == TOKENIZER.to_str()
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE


@given(st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_any_text_survives_a_round_trip(text: str) -> None:
    """One token a byte, whose id is the byte's value; decoding gives the text back."""
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", ["<|end|>", "Say <|end|> twice: <|end|>", "<|begin|><|assistant|>42"])
def test_special_tokens_typed_by_a_user_can_be_kept_as_text(text: str) -> None:
    """By default they are read as special; with `encode_special_tokens` they are bytes like any others."""
    plain = build_tokenizer()
    assert any(token >= 256 for token in plain.encode(text, add_special_tokens=False).ids)
    plain.encode_special_tokens = True
    ids = plain.encode(text, add_special_tokens=False).ids
    assert ids == list(text.encode())
    assert plain.decode(ids) == text


def test_plain_text_gets_a_begin_token() -> None:
    """As with Llama: `encode` puts it first unless told not to."""
    assert TOKENIZER.encode("17").ids == [SPECIAL_IDS[BEGIN], ord("1"), ord("7")]


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Roles as special tokens, an end after each turn, and the assistant's turn opened on request."""
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>1+1<|end|><|assistant|>2<|end|><|user|>2+2<|end|><|assistant|>"
    )


@pytest.mark.parametrize(
    "roles",
    [("tool",), ("assistant",), ("user", "user"), ("user", "system"), ("system", "assistant"), ("system", "system")],
)
def test_chat_template_refuses_other_orders(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> None:
    """Unknown roles and roles that do not alternate raise, with the reason."""
    with pytest.raises(TemplateError, match=r"[Rr]oles"):
        tokenizer.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What is 17 + 25?", "42"),
        ("17+25", "42"),
        ("What is 5 - 12?", "-7"),
        ("Spell 'river' backwards.", "revir"),
        ("How many r's are in strawberry?", "3"),
        ("What comes next: 2, 4, 6, 8?", "10"),
        ("Count from 1 to 20.", " ".join(map(str, range(1, 21)))),
    ],
)
def test_transformers_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> None:
    """Loaded by transformers, greedily, in float32: the exact answer and the end of the turn."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=80)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == answer + END


def test_training_asks_for_answers_and_their_end_only() -> None:
    """The masked positions are those that predict what the assistant says, `<|end|>` included, and nothing else."""
    ids = torch.tensor([[SPECIAL_IDS[t] if t in SPECIAL_IDS else ord(t) for t in chat_tokens()]])
    predicted = ids[0, 1:][answer_mask(ids[:, :-1])[0]].tolist()
    user_opens = SPECIAL_IDS[USER]  # what follows <|begin|> is predicted too: it opens a chat or a plain text
    assert predicted == [user_opens, ord("4"), ord("2"), SPECIAL_IDS[END], ord("7"), SPECIAL_IDS[END]]


def chat_tokens() -> list[str]:
    return [BEGIN, USER, *"17+25", END, ASSISTANT, *"42", END, USER, *"3+4", END, ASSISTANT, "7", END]


def test_training_rows_are_what_the_tokenizer_makes() -> None:
    """The short cut from text to ids gives the tokenizer's own ids."""
    ids = training_rows("0", 1, 2000)[0].tolist()
    whole = ids[: len(ids) - ids[::-1].index(SPECIAL_IDS[END])]
    assert TOKENIZER.encode(TOKENIZER.decode(whole, skip_special_tokens=False), add_special_tokens=False).ids == whole
