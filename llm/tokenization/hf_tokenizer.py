"""`HFTokenizer`: the tokenizer and chat template of a Hugging Face checkpoint, through the `tokenizers` library."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as RustTokenizer

from llm.checkpoint.generation_defaults import find_vocab_size, load_generation_defaults
from llm.checkpoint.json_files import read_json_if_there
from llm.errors import CheckpointError, InvalidRequestError
from llm.tokenization.chat_template import ChatTemplate
from llm.tokenization.control_tokens import Disguise, find_control_tokens, without_surrogates
from llm.tokenization.definitions import read_definition, with_ids_below, without_control_tokens
from llm.tokenization.detokenizer import ByteDecoder, TokenBytes, WindowDecoder, decode_all
from llm.tokenization.special_tokens import CONFIG, SpecialTokens, read_special_tokens
from llm.tokenization.surroundings import Surroundings
from llm.tokenization.template_files import find_templates

_BATCH_TEXTS = 256
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class HFTokenizer:
    """Text to ids and back as the checkpoint's `tokenizer.json` says. Thread-safe; encoding releases the GIL.

    Control tokens in text stay text: `encode` never makes one of them from its input, and `apply_chat_template`
    makes them only from what the template itself writes. Control tokens are the special tokens and those added
    tokens that look like markup (`<think>`).

    Args:
        definition: the content of `tokenizer.json`.
        special_tokens: `bos_token`, `eos_token`, … and what else other files say; None for nothing.
        add_bos_token, add_eos_token: whether `bos_token` goes in front of texts and `eos_token` behind them, where
            `tokenizer.json` has no post-processor, which else says so.
        eos_token_ids: ids with which the model ends an answer, beside `eos_token`'s.
        model_vocab_size: ids of the model, which never ends an answer with one past them; None for no limit.
        templates: chat templates by name: `default`, and `tool_use` where tools need another.
    """

    def __init__(
        self,
        definition: str,
        *,
        special_tokens: SpecialTokens | None = None,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        eos_token_ids: Sequence[int] = (),
        model_vocab_size: int | None = None,
        templates: dict[str, ChatTemplate] | None = None,
    ) -> None:
        special = special_tokens or SpecialTokens()
        self._full = _without_limits(RustTokenizer.from_str(definition))
        if special.add_to(self._full):
            definition = str(self._full.to_str())
        self._control = find_control_tokens(self._full, special.texts)
        plain = without_control_tokens(definition, self._control.ids, self._full.get_vocab(with_added_tokens=False))
        self._plain = RustTokenizer.from_str(plain)
        # A piece that does not begin the text must not get the space that SentencePiece puts in front of one.
        inner = plain.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        self._plain_inner = self._plain if inner == plain else RustTokenizer.from_str(inner)
        self._templates = templates or {}
        self._special_tokens = dict(special.named)
        self._vocab_size = max(self._full.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special_ids = frozenset(token.token_id for token in self._control.by_text.values() if token.is_special)
        try:
            self._token_bytes: TokenBytes | None = TokenBytes(self._full, special_ids)
        except ValueError:
            self._token_bytes = None
        self._longest_token = max(map(len, self._full.get_vocab(with_added_tokens=True)), default=1)
        bos_ids, eos_ids = (self._named_ids(special.named.get(name)) for name in ("bos_token", "eos_token"))
        self._around = Surroundings.of(self._full, bos_ids if add_bos_token else (), eos_ids if add_eos_token else ())
        self._eos_token_ids = frozenset(
            i for i in (*eos_token_ids, *eos_ids) if model_vocab_size is None or i < model_vocab_size
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, chat_template: str | None = None) -> Self:
        """Read a checkpoint directory's tokenizer, its chat templates and its end-of-sequence ids.

        Args:
            directory: of the checkpoint.
            chat_template: Jinja text to use in place of all of the checkpoint's templates.

        Raises:
            CheckpointError, ConfigError: a file is missing or cannot be used; one line with its name and the fix.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        config = read_json_if_there(directory / CONFIG)
        special = read_special_tokens(directory, config)
        sources = find_templates(directory, config)
        if chat_template is not None:
            sources = {"default": (chat_template, "chat_template")}
        templates = {
            name: ChatTemplate(source, origin=origin, special_tokens=special.named)
            for name, (source, origin) in sources.items()
        }
        defaults = load_generation_defaults(directory)
        try:
            return cls(
                read_definition(path),
                special_tokens=special,
                add_bos_token=config.get("add_bos_token") is True,
                add_eos_token=config.get("add_eos_token") is True,
                eos_token_ids=tuple(defaults.eos_token_ids),
                model_vocab_size=find_vocab_size(directory),
                templates=templates,
            )
        except Exception as error:
            if type(error) not in (Exception, ValueError, KeyError, TypeError):  # the library raises bare Exceptions
                raise
            raise CheckpointError(f"{path} is not a tokenizer definition: {error}; download it again") from error

    @property
    def vocab_size(self) -> int:
        """Highest id plus one, special tokens included."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokenizer's `eos_token` and the ids in `generation_config.json` (else `config.json`)."""
        return self._eos_token_ids

    @property
    def definition(self) -> str:
        """The content of `tokenizer.json`, in JSON, with what other files add to it."""
        return str(self._full.to_str())

    def cut_definition(self, num_ids: int) -> str:
        """The same with the tokens below an id alone, for a model that has no others."""
        return self.definition if self._vocab_size <= num_ids else with_ids_below(self.definition, num_ids)

    @property
    def template_origin(self) -> str:
        """Where the chat template is from that is used without tools."""
        return self._templates["default"].origin if self.has_chat_template else ""

    @property
    def default_template(self) -> ChatTemplate | None:
        """The chat template that is used without tools."""
        return self._templates.get("default")

    @property
    def template_sources(self) -> str:
        """Jinja text of all chat templates, to see what they know."""
        return "\n".join(template.source for template in self._templates.values())

    def split_control(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Cut a text at its control tokens: each plain piece, and the id of the token behind it.

        Texts of users must not get here: their control tokens are none.
        """
        for _, piece, token in self._control.split(text):
            yield piece, None if token is None else token.token_id

    def templates_read(self, name: str) -> bool:
        """Whether a chat template reads a variable of that name."""
        return any(template.reads(name) for template in self._templates.values())

    def new_template(self, source: str, origin: str) -> ChatTemplate:
        """A template that is given this tokenizer's special tokens.

        Args:
            source: Jinja text.
            origin: where it is from, for error messages.

        Raises:
            ConfigError: it is not valid Jinja.
        """
        return ChatTemplate(source, origin=origin, special_tokens=self._special_tokens)

    def token_id(self, text: str) -> int | None:
        """Id of the token that the vocabulary has under this text, or else of the one token that the text becomes."""
        found: int | None = self._full.token_to_id(text)
        if found is not None:
            return found
        ids = self.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return "default" in self._templates

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the checkpoint puts around a text unless told otherwise."""
        ids = self._encode_plain(without_surrogates(text))
        return [*self._around.prefix, *ids, *self._around.suffix] if add_special_tokens else ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, of many texts, which takes a fraction of the time where they are short."""
        return [[*self._around.prefix, *ids, *self._around.suffix] for ids in self._encode_plain_all(texts)]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of each pair of texts, with the special tokens that the checkpoint puts around and between them, as
        transformers' `tokenizer(text, text_pair)` gives them; a text that stands in several pairs is encoded once.

        Raises:
            InvalidRequestError: its post-processor does more with a pair than to put tokens around the texts.
        """
        if self._around.of_pair is None:
            raise InvalidRequestError("this model's tokenizer joins two texts in a way that is not supported")
        front, middle, end = self._around.of_pair
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        ids_of = dict(zip(texts, self._encode_plain_all(texts), strict=True))
        return [[*front, *ids_of[first], *middle, *ids_of[second], *end] for first, second in pairs]

    def _encode_plain_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in which nothing is a control token, without tokens around them."""
        batch: list[list[int]] = []
        for start in range(0, len(texts), _BATCH_TEXTS):
            some = [without_surrogates(text) for text in texts[start : start + _BATCH_TEXTS]]
            for text, encoding in zip(some, self._plain.encode_batch_fast(some, add_special_tokens=False), strict=True):
                ids = encoding.ids
                if not self._control.ids.isdisjoint(ids):
                    ids = self._encode_plain(text)
                batch.append(ids)
        return batch

    def min_num_tokens(self, text: str) -> int:
        """A bound from below on `len(encode(text))`, found without encoding, to refuse huge texts early."""
        # A normalizer may compose characters; none of the usual forms shortens a text to less than a quarter.
        shrinkage = 4 if self._full.normalizer is not None else 1
        return len(text) // (self._longest_token * shrinkage)

    def decode(self, token_ids: Sequence[int], *, shown_ids: frozenset[int] = frozenset()) -> str:
        """Text of a whole sequence; an incomplete character becomes U+FFFD.

        Args:
            shown_ids: special tokens that are not left out.
        """
        return decode_all(self.new_decoder(shown_ids), token_ids)

    def special_ids(self, texts: Collection[str]) -> frozenset[int]:
        """Ids of those of the texts that are special tokens, which decoding leaves out."""
        found = (self._control.by_text.get(text) for text in texts)
        return frozenset(token.token_id for token in found if token is not None and token.is_special)

    def token_text(self, token_id: int) -> str:
        """Text of one token; a special token's name, U+FFFD for bytes that are no character by themselves."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, which may be part of a character; a special token's name."""
        if self._token_bytes is not None:
            return self._token_bytes.raw(token_id)
        text: str = self._full.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def new_decoder(self, shown_ids: frozenset[int] = frozenset()) -> ByteDecoder | WindowDecoder:
        """A decoder for a fresh sequence.

        Args:
            shown_ids: special tokens that are not left out.
        """
        if self._token_bytes is not None:
            return ByteDecoder(self._token_bytes, shown_ids)
        return WindowDecoder(self._full, shown_ids)

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a chat, as transformers' `apply_chat_template` gives them, but for control tokens in its text.

        Args:
            messages: dictionaries with `role` and what else the template reads; not changed.
            add_generation_prompt: end with what opens the assistant's answer.
            tools: JSON descriptions of functions the model may call.
            variables: further template variables, such as `enable_thinking`.

        Raises:
            InvalidRequestError: there is no template, it refuses these messages, or it works too long on them.
        """
        chat = self.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables)
        return self.encode_chat(chat)

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> "RenderedChat":
        """Text of a chat, to be encoded by `encode_chat`; see `apply_chat_template`.

        Raises:
            InvalidRequestError: there is no template, it refuses these messages, or it works too long on them.
        """
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise InvalidRequestError("this model has no chat template; send a prompt instead", param="messages")
        return self.render(template, messages, variables, add_generation_prompt=add_generation_prompt, tools=tools)

    def render(
        self,
        template: ChatTemplate,
        messages: Sequence[dict[str, Any]],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
    ) -> "RenderedChat":
        """As `render_chat`, by a given template; see `new_template`.

        Raises:
            InvalidRequestError: it refuses these messages, or works too long on them.
        """
        if not messages:
            raise InvalidRequestError("messages is empty; send at least one", param="messages")
        for message in messages:
            role = message.get("role")
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise InvalidRequestError("each message needs a role, a short plain word", param="messages")
        disguise = Disguise(self._control)
        text = template.render(
            disguise.messages(messages),
            add_generation_prompt=add_generation_prompt,
            tools=disguise.apply(tools) if tools else None,
            variables=disguise.apply(variables),
        )
        return RenderedChat(text, disguise)

    def encode_chat(self, chat: "RenderedChat") -> list[int]:
        """Token ids of a chat's text."""
        text, disguise = chat.text, chat.disguise
        if not disguise.is_used:
            return _encode(self._full, text)
        ids: list[int] = []
        for offset, piece, token in self._control.split(text):
            ids += self._encode_plain(disguise.reveal(piece), begins_text=offset == 0)
            if token is not None:
                ids.append(token.token_id)
        return ids

    def _encode_plain(self, text: str, *, begins_text: bool = True) -> list[int]:
        """Ids of text in which nothing is a control token."""
        if not text:
            return []
        first = self._plain if begins_text else self._plain_inner
        ids = _encode(first, text)
        if self._control.ids.isdisjoint(ids):
            return ids
        # The model's own vocabulary holds a control token's text: cut each one in two.
        ids = []
        start = 0
        for match in self._control.pattern.finditer(text):
            cut = match.start() + 1
            ids += _encode(self._plain_inner if start else first, text[start:cut])
            start = cut
        return ids + _encode(self._plain_inner if start else first, text[start:])

    def _named_ids(self, token: str | None) -> tuple[int, ...]:
        """The id of a token, if there is one."""
        token_id = self._full.token_to_id(token) if token else None
        return () if token_id is None else (token_id,)


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """What a chat template has made of a chat.

    Attributes:
        text: control tokens of the template as they are, those of the chat's own text disguised.
        disguise: undoes this.
    """

    text: str
    disguise: Disguise


def _encode(tokenizer: RustTokenizer, text: str) -> list[int]:
    # Of the library's ways to encode, only those for batches release the GIL; the fast one leaves out offsets.
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _without_limits(tokenizer: RustTokenizer) -> RustTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
