"""Tokenizer: text to token ids and back, and chat messages to a prompt, from a model's own files.

`load_tokenizer` reads tokenizer.json with its tokenizer_config.json and chat template (Hugging Face), or a GGUF
file's metadata. It knows no torch and holds no state between calls; streaming text is detokenizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import ByteLevel

from engine.errors import InvalidRequest, ModelError
from engine.models.chat_template import ChatTemplate
from engine.models.config import ModelConfig
from engine.models.detokenizer import IncrementalDetokenizer
from engine.models.gguf_file import read_gguf
from engine.models.gguf_tokenizer import build_tokenizer
from engine.models.gguf_vocabulary import strings
from engine.models.store import ModelFiles, ModelKind, read_json

__all__ = ["IncrementalDetokenizer", "Tokenizer", "load_tokenizer"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_GGUF_IDS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class Tokenizer:
    """One model's vocabulary. Safe for use by several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int] = (),
        template: str | None = None,
        tool_template: str | None = None,
    ) -> None:
        """`special_tokens` maps bos_token, eos_token, ... to their text; its eos joins `eos_token_ids`. A
        `tool_template` is used instead of `template` where there are tools."""
        self._backend = backend
        eos = self._id_of(special_tokens.get("eos_token"))
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *([] if eos is None else [eos])]))
        self.bos_id = self._id_of(special_tokens.get("bos_token"))
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._template = None if template is None else ChatTemplate(template, special_tokens)
        self._tool_template = None if tool_template is None else ChatTemplate(tool_template, special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def knows_tools(self) -> bool:
        """Does a template of the model's show it tools?"""
        return self._tool_template is not None or (self._template is not None and self._template.knows_tools)

    @property
    def template_source(self) -> str:
        """All that the model's templates say; empty if it has none."""
        return "".join(one.source for one in (self._template, self._tool_template) if one is not None)

    @property
    def is_bytewise(self) -> bool:
        """Does `decode` put the bytes of tokens together, and nothing else?"""
        return isinstance(self._backend.decoder, ByteLevel)

    def special_id(self, token: str) -> int | None:
        """The id of a special token, which `decode` skips; None if it is ordinary text or several tokens."""
        token_id = self._backend.token_to_id(token)
        return token_id if token_id in self.special_ids else None

    def to_json(self) -> str:
        """In Hugging Face's format, tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` adds what the model puts around a prompt, e.g. BOS. Special tokens
        written out in the text become their ids. Raises InvalidRequest for a text that no UTF-8 can hold."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special).ids
        except TypeError as error:
            raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, and ids outside the vocabulary nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """Text of one token, special or not; U+FFFD where it is a part of a character."""
        return self.decode([token_id], skip_special=False)

    def token_name(self, token_id: int) -> str:
        """The vocabulary's own word for a token, in which bytes and spaces may stand as other characters."""
        return self._backend.id_to_token(token_id) or ""

    def visible_ids(
        self, ids: Iterable[int], skip_special: bool = True, shown: frozenset[int] = frozenset()
    ) -> list[int]:
        """Those of `ids` which `decode` turns into text: none outside the vocabulary, none that is to be skipped but
        those in `shown`."""
        hidden = self.special_ids - shown if skip_special else ()
        return [i for i in ids if i not in hidden and self._backend.id_to_token(i) is not None]

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt of a conversation, to be encoded with add_special=False; `variables` are the template's own.
        Raises InvalidRequest if the model has no chat template, or if its template refuses the messages."""
        if self._template is None:
            raise InvalidRequest(
                "this model has no chat template; use completions with a plain prompt", param="messages"
            )
        template = self._tool_template if tools and self._tool_template is not None else self._template
        return template.render(messages, add_generation_prompt, tools, variables)

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


def load_tokenizer(files: ModelFiles, config: ModelConfig) -> Tokenizer:
    """The model's tokenizer. Raises ModelError that names the file, and in `param` the field, at fault."""
    if files.kind is ModelKind.HF:
        return _from_folder(files.path, config)
    try:
        return _from_gguf(files.path, config)
    except ModelError as error:
        raise ModelError(f"{files.path}: {error.message}", param=error.param) from error


def _from_folder(folder: Path, config: ModelConfig) -> Tokenizer:
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    backend = _read_backend(folder / "tokenizer.json")
    specials = {name: text for name in _SPECIAL_NAMES if (text := _token_content(settings.get(name))) is not None}
    if "bos_token" not in specials and config.bos_token_id is not None:
        bos = backend.id_to_token(config.bos_token_id)
        specials |= {} if bos is None else {"bos_token": bos}
    template, tool_template = _folder_templates(folder, settings)
    return Tokenizer(backend, specials, config.eos_token_ids, template, tool_template)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path} is missing; a tokenizer in another format is not supported")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises the bare class
        raise ModelError(f"{path} is no valid tokenizer: {error}") from error


def _token_content(value: object) -> str | None:
    """A special token's text; tokenizer_config.json holds it plain or in a record."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _folder_templates(folder: Path, settings: Mapping[str, object]) -> tuple[str | None, str | None]:
    """The template for chats and, where there is another one, that for chats with tools: from files of their own, else
    from tokenizer_config.json, of several those named default and tool_use."""
    found = settings.get("chat_template")
    named: dict[object, object] = {"default": found}
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
    files = {"default": folder / "chat_template.jinja", "tool_use": folder / "additional_chat_templates/tool_use.jinja"}
    named |= {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    return _text_or_none(named.get("default")), _text_or_none(named.get("tool_use"))


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _from_gguf(path: Path, config: ModelConfig) -> Tokenizer:
    metadata = read_gguf(path).metadata
    tokens = strings(metadata, "tokenizer.ggml.tokens")
    specials = {}
    for name, key in _GGUF_IDS.items():
        token_id = metadata.get(key)
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            specials[name] = tokens[token_id]
    templates = (metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.chat_template.tool_use"))
    return Tokenizer(build_tokenizer(metadata), specials, config.eos_token_ids, *map(_text_or_none, templates))
