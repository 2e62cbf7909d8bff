"""The tokenizer: one token a byte, whose id is the byte's value, and a few special tokens after them.

Any Unicode text encodes and decodes exactly; digits and letters are single tokens, which makes the tasks learnable.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BEGIN = "<|begin|>"
END = "<|end|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"

# The reserved ones round the vocabulary up to a multiple of eight, which matrix units like.
SPECIAL_TOKENS = (BEGIN, END, PAD, SYSTEM, USER, ASSISTANT, "<|reserved_0|>", "<|reserved_1|>")
SPECIAL_IDS = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set turns = messages %}
{%- if messages and messages[0]['role'] == 'system' %}
    {{- '<|system|>' + messages[0]['content'] + '<|end|>' }}
    {%- set turns = messages[1:] %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('Roles are user, assistant and, for the first message only, system: not '
            + message['role'] | string) }}
    {%- endif %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles alternate: user, assistant, user, ...') }}
    {%- endif %}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def build_tokenizer() -> Tokenizer:
    """Return a byte-level BPE without merges; encoding puts `<|begin|>` first unless told to add no special tokens."""
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, SPECIAL_IDS[BEGIN])]
    )
    return tokenizer


def write_tokenizer(folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, the chat template inside, as transformers reads them."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_symbols() -> list[str]:
    """Return the character that byte-level tokenizers write for each byte.

    Printable bytes stand for themselves; the others get the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]
