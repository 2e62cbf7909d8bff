"""Small tokenizers of the kinds that Llama 2, Llama 3, Mistral and Qwen have, written as checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm.tokenization.hf_tokenizer import HFTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. You are a helpful assistant; what is the capital of France?",
    "def add(a, b):\n    return a + b\n\n\tprint('hello world', 12345)  # naïve café, déjà vu, 東京 and 😀🎉",
    "system user assistant end header start content role message tool call think begin of text",
] * 4

_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
)

LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def byte_level(special: list[str], markup: list[str], bos: str | None) -> Tokenizer:
    """Byte-level BPE as Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = None if bos else normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in markup])
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=None, special_tokens=[(bos, tokenizer.token_to_id(bos))]
                ),
            ]
        )
    return tokenizer


def sentencepiece(*, legacy: bool) -> Tokenizer:
    """BPE with byte fallback: Llama 2's (`legacy`) puts a space before each piece, Mistral's before the text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted(set("".join(CORPUS[:1])) | set("▁[]/INST<>|?!,\n") - {" "})
    for letter in letters:
        vocab.setdefault(letter, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("q", "u"), ("i", "s"), ("▁", "is"), ("▁", "a"), ("I", "N")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Byte-fallback BPE whose decoder is Metaspace."""
    tokenizer = sentencepiece(legacy=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words, no decoder: the library joins them with spaces."""
    vocab = {word: index for index, word in enumerate(["<unk>", "</s>", "hello", "world", "<", "/s", ">"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, object]]] = {
    "llama3": (
        lambda: byte_level(LLAMA3_SPECIAL, [], "<|begin_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3_TEMPLATE},
    ),
    "qwen": (
        lambda: byte_level(QWEN_SPECIAL, QWEN_MARKUP, None),
        {"eos_token": "<|im_end|>", "add_bos_token": False, "chat_template": CHATML_TEMPLATE},
    ),
    "llama2": (
        lambda: sentencepiece(legacy=True),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": MISTRAL_TEMPLATE},
    ),
    "mistral": (
        lambda: sentencepiece(legacy=False),
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": MISTRAL_TEMPLATE},
    ),
    "metaspace": (metaspace, {"bos_token": "<s>", "eos_token": "</s>"}),
    "words": (word_level, {"eos_token": "</s>"}),
}


def write_checkpoint(directory: Path, tokenizer: Tokenizer, config: dict[str, object]) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory for each of `KINDS`."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_checkpoint(root / kind, make(), config) for kind, (make, config) in KINDS.items()}


@pytest.fixture(scope="session")
def tokenizers(checkpoints: dict[str, Path]) -> dict[str, HFTokenizer]:
    """Our tokenizer for each of `KINDS`."""
    return {kind: HFTokenizer.from_pretrained(directory) for kind, directory in checkpoints.items()}
