"""Text to token ids and back, from a Hugging Face model directory; no transformers, no torch.

Owns what the directory says about text: ``tokenizer.json``, the chat template and the end-of-sequence ids.
Understands byte-level tokens (Qwen, Llama 3) and SentencePiece pieces with byte fallback (Mixtral).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from engine.config import ConfigError
from engine.text.chat_template import CHATML_TEMPLATE, ChatTemplate
from engine.types import InvalidRequestError

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """One model's tokenizer; safe to share between threads. Made by :func:`load_tokenizer`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        piece_bytes: Callable[[str], bytes],
        chat_template: ChatTemplate,
        special_tokens: Mapping[str, str],
        eos_token_ids: frozenset[int],
    ) -> None:
        self._backend = backend
        self._piece_bytes = piece_bytes
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens)
        self._bytes: dict[int, bytes] = {}  # of tokens seen so far
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.eos_token_ids = eos_token_ids
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Text from :meth:`apply_chat_template` already holds its special tokens."""
        return self._backend.encode(_require_unicode(text, "prompt"), add_special_tokens=add_special_tokens).ids

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        return self._backend.to_str()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; ``variables`` are further ones that the template may read.

        Raises InvalidRequestError when the template refuses the messages.
        """
        own = {"add_generation_prompt": add_generation_prompt, **self._special_tokens}
        try:
            prompt = self._chat_template.render(messages, tools, {**(variables or {}), **own})
        except Exception as error:  # the template is the checkpoint's own program: it may fail in any way
            reason = str(error) or type(error).__name__
            raise InvalidRequestError(
                f"messages do not fit the model's chat template: {reason}", param="messages"
            ) from error
        return _require_unicode(prompt, "messages")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that ``token_id`` adds to the text; empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            piece = self._backend.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if piece is None else self._piece_bytes(piece)
        return known

    def token_text(self, token_id: int) -> str:
        """``token_bytes`` as text; U+FFFD where a token holds only a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, which never shows in text."""
        return token_id in self._special_ids


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a Hugging Face directory. Raises ConfigError naming the file that is missing or broken."""
    directory = Path(path)
    tokenizer_file = directory / "tokenizer.json"
    settings = _read_json(tokenizer_file)
    try:
        backend = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{tokenizer_file} is not a valid tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    tokenizer_config = _read_json(directory / "tokenizer_config.json", optional=True)
    special_tokens = _special_tokens(tokenizer_config)
    return Tokenizer(
        backend,
        piece_bytes=_piece_decoder(settings, tokenizer_file),
        chat_template=_compile_chat_template(directory, tokenizer_config),
        special_tokens=special_tokens,
        eos_token_ids=_eos_token_ids(directory, backend, special_tokens),
    )


def _read_json(file: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist; a model directory needs it") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


def _require_unicode(text: str, param: str) -> str:
    """``text`` itself, unless it holds half a surrogate pair, which JSON can spell but UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{param} holds a lone surrogate at character {error.start}", param) from error
    return text


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Name |-> text of the special tokens that are set; each is spelled as a string or as an object."""
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = tokenizer_config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _eos_token_ids(directory: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> frozenset[int]:
    """What generation_config.json says, else config.json; the tokenizer's own end token always counts."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        stated = _read_json(directory / name, optional=True).get("eos_token_id")
        if stated is None:
            continue
        stated_ids = stated if isinstance(stated, list) else [stated]
        if not all(type(token_id) is int and token_id >= 0 for token_id in stated_ids):
            raise ConfigError(f"{directory / name}: eos_token_id is {stated!r}; allowed: a token id or a list of them")
        ids.update(stated_ids)
        break
    eos_id = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    return frozenset(ids if eos_id is None else ids | {eos_id})


def _compile_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate:
    """chat_template.jinja wins over tokenizer_config.json, as in transformers; ChatML if there is neither."""
    file, source = directory / "tokenizer_config.json", tokenizer_config.get("chat_template")
    if (jinja_file := directory / "chat_template.jinja").exists():
        try:
            file, source = jinja_file, jinja_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{jinja_file} cannot be read as text: {error}") from error
    if isinstance(source, list):  # several named templates
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if source is None:
        source = CHATML_TEMPLATE
    try:
        return ChatTemplate(source)
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: the chat template does not compile: {error}") from error


def _piece_decoder(settings: Mapping[str, Any], file: Path) -> Callable[[str], bytes]:
    """How a vocabulary entry spells bytes, told by the ``decoder`` of tokenizer.json."""
    decoder = settings.get("decoder") or {}
    steps = {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}
    if "ByteLevel" in steps:
        return _byte_level_bytes
    if "ByteFallback" in steps:
        return _byte_fallback_bytes
    raise ConfigError(
        f"{file}: decoder is {decoder.get('type')!r}; allowed: ByteLevel, or a Sequence with ByteFallback"
    )


def _byte_level_alphabet() -> dict[str, int]:
    """Character |-> byte of GPT-2's byte-level alphabet: printable Latin-1 is itself, the rest starts at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in piece])
    except KeyError:  # an added token, spelled as it is
        return piece.encode("utf-8")


def _byte_fallback_bytes(piece: str) -> bytes:
    if match := BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace("▁", " ").encode("utf-8")
