"""Text <-> token ids: encoding, chat templates, decoding token by token, stop strings.

transformers is imported inside `Tokenizer.load` only, so that importing this module costs nothing. Knows nothing of
requests or models; what a token id means to the network is not said here.
"""

from __future__ import annotations

import codecs
import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tandem.errors import ConfigError, InvalidRequest, ModelError
from tandem.gguf.container import read_gguf
from tandem.gguf.vocabulary import load_tokenizer
from tandem.hub import TOKENIZER_FILES, is_gguf, resolve_model

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "A probe: naïve, 東京 🙂👩‍👩‍👧 42\n\tend."


class Tokenizer:
    """A Hugging Face tokenizer with a `tokenizers` backend, and its chat template."""

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        self._hf = hf
        self._backend = hf.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.chat_template: str | None = chat_template or _default_template(hf.chat_template)
        self._reserved = frozenset(inspect.signature(hf.apply_chat_template).parameters)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.eos_id: int | None = hf.eos_token_id
        self.longest_token = max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}
        self.style, self.strips_first_space = _decoder_style(json.loads(self._backend.to_str())["decoder"])
        if not self._style_holds():
            self.style = "window"

    @classmethod
    def load(cls, path: str, chat_template: str | None = None, revision: str | None = None) -> Tokenizer:
        """The tokenizer of a directory, GGUF file or hub id (at `revision`). `chat_template`: a file, or the template
        itself, instead of its own.

        Raises ModelError where there is no usable tokenizer, ConfigError where the template file does not exist.
        """
        where = resolve_model(path, revision, TOKENIZER_FILES)
        if is_gguf(where):
            return cls(load_tokenizer(read_gguf(where)), _read_template(chat_template))
        if not any((where / name).exists() for name in _TOKENIZER_FILES):
            raise ModelError(f"{path} has no tokenizer (no tokenizer.json): copy it there or give --tokenizer DIR")
        # A tokenizer.json needs none of the per-model classes, whose lookup would pull torch into this process.
        import transformers

        is_plain = (where / "tokenizer.json").exists()
        loader: Any = transformers.PreTrainedTokenizerFast if is_plain else transformers.AutoTokenizer
        try:
            hf = loader.from_pretrained(where)
        except Exception as e:  # transformers raises whatever its files made it stumble over
            reason = str(e).strip().split("\n")[0]
            raise ModelError(f"cannot load the tokenizer of {path} ({reason}): give --tokenizer DIR_OR_HUB_ID") from e
        if getattr(hf, "backend_tokenizer", None) is None:
            raise ModelError(f"the tokenizer of {path} has no tokenizer.json form: convert it, or give --tokenizer DIR")
        return cls(hf, _read_template(chat_template))

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as e:  # what the backend makes of lone surrogates
            raise InvalidRequest("the text is not valid Unicode: it contains lone surrogates") from e

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[Any]:
        """A `tokenizers.Encoding` (ids, and which characters each came from) per text."""
        try:
            return self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as e:  # what the backend makes of lone surrogates
            raise InvalidRequest("the text is not valid Unicode: it contains lone surrogates") from e

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """The conversation as token ids. Raises InvalidRequest where the template is missing or refuses it.

        Templates write the special tokens themselves; `add_special_tokens` is for those that do not.
        """
        text = self.render_text(
            messages, tools, add_generation_prompt, continue_final_message, chat_template_kwargs, chat_template
        )
        return self.encode(text, add_special_tokens)

    def render_text(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> str:
        """What `render` encodes."""
        template, messages = self._checked(messages, tools, chat_template)
        extra = chat_template_kwargs or {}
        if taken := sorted(self._reserved & extra.keys()):
            raise InvalidRequest(f"chat_template_kwargs may not set {', '.join(taken)}", "chat_template_kwargs")
        try:
            return self._hf.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **extra,
            )
        except Exception as e:  # templates are programs: they fail in any way a program can
            raise InvalidRequest(f"the chat template refuses these messages: {e}", "messages") from e

    @property
    def marks_generation(self) -> bool:
        """Whether the chat template says itself, by {% generation %}, which text is the model's."""
        return self.chat_template is not None and _GENERATION.search(self.chat_template) is not None

    def render_spans(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation as text, and the character ranges inside the template's {% generation %} blocks."""
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        template, messages = self._checked(messages, tools, None)
        # apply_chat_template renders this way, but gives ranges only as a mask over tokens.
        messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
        try:
            texts, spans = render(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._hf.special_tokens_map,
            )
        except Exception as e:  # templates are programs: they fail in any way a program can
            raise InvalidRequest(f"the chat template refuses these messages: {e}", "messages") from e
        return texts[0], spans[0]

    def _checked(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, chat_template: str | None
    ) -> tuple[str, list[dict[str, Any]]]:
        """The template to use and the messages in the roles it knows."""
        template = chat_template or self.chat_template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
                "messages",
            )
        if tools and "tools" not in template:
            raise InvalidRequest("this model's chat template does not take tools", "tools")
        if "developer" not in template:
            messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
        return template, messages

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to a text (special tokens: their name)."""
        piece = self._bytes.get(token_id)
        if piece is None:
            piece = self._bytes[token_id] = self._piece(token_id)
        return piece

    def token_text(self, token_id: int) -> str:
        """The token as text; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def whole_text(self, token_id: int) -> str | None:
        """The token's text where it is made of whole characters, else None."""
        if token_id not in self._texts:
            try:
                self._texts[token_id] = self.token_bytes(token_id).decode("utf-8")
            except UnicodeDecodeError:
                self._texts[token_id] = None
        return self._texts[token_id]

    def _piece(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:  # models pad their vocabulary beyond the tokenizer's
            return b""
        if self.style == "byte_level":
            raw = [_BYTE_OF.get(char) for char in token]
            return token.encode() if None in raw else bytes(raw)  # type: ignore[arg-type]
        if self.style == "sentencepiece":
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()
        return self._backend.decode([token_id], skip_special_tokens=False).encode()

    def _style_holds(self) -> bool:
        """Whether concatenated pieces give what the backend's decoder gives, on a probe of hard text."""
        ids = self.encode(_PROBE, add_special_tokens=False)
        detokenizer = Detokenizer(self, skip_special_tokens=False)
        text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
        return text == self.decode(ids, skip_special_tokens=False)


class Detokenizer:
    """Token ids of one text in, its characters out as soon as they are whole.

    The concatenated output is what decoding all ids at once gives; only where a tokenizer with byte fallback is fed
    invalid UTF-8 does it differ in the number of U+FFFD. `context`: the ids the text continues (a prompt), so that
    the first piece keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        context = [i for i in context if i not in self._hidden]
        self._strip = tokenizer.strips_first_space and not context
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = False
        self._window = context[-6:] if tokenizer.style == "window" else None
        self._shown = tokenizer.decode(self._window, False) if self._window else ""
        self._settled = len(self._window or ())

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        if self._window is not None:
            return self._push_window(token_id)
        if not self._pending and not self._strip:
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                return text
        piece = self._tokenizer.token_bytes(token_id)
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        text = self._utf8.decode(piece)
        self._pending = bool(self._utf8.getstate()[0])
        return text

    def finish(self) -> str:
        """What was held back, broken characters as U+FFFD."""
        if self._window is not None:
            return self._tokenizer.decode(self._window, False)[len(self._shown) :]
        self._pending = False
        return self._utf8.decode(b"", True)

    def _push_window(self, token_id: int) -> str:
        """For decoders whose pieces depend on their neighbours: decode a short window twice and show the difference."""
        window = self._window
        assert window is not None
        window.append(token_id)
        text = self._tokenizer.decode(window, False)
        held = len(window) - self._settled
        if text.endswith(_REPLACEMENT) and held < 8:
            return ""
        new = text[len(self._shown) :]
        del window[: self._settled]
        self._settled = len(window)
        self._shown = self._tokenizer.decode(window, False)
        return new


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces, whatever the pieces.

    Text that may be the beginning of a stop string is held back. The stop string that is complete first wins, of two
    that end together the longer one. After `matched` is set nothing more comes out.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show and was not shown yet."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else at]
        keep = self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for keep in range(longest, 0, -1):
            tail = text[len(text) - keep :]
            if any(stop.startswith(tail) for stop in self._stops):
                return keep
        return 0


def _byte_alphabet() -> dict[str, int]:
    """The characters byte-level tokenizers write for the 256 bytes (GPT-2's table), reversed."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()

Style = Literal["byte_level", "sentencepiece", "window"]


def _decoder_style(decoder: dict[str, Any] | None) -> tuple[Style, bool]:
    """How pieces become text, and whether the first one loses a leading space, from tokenizer.json's `decoder`."""
    steps = (decoder or {}).get("decoders") or [decoder or {}]
    types = [step.get("type") for step in steps]
    if set(types) <= {"ByteLevel", "Fuse"} and "ByteLevel" in types:
        return "byte_level", False
    strips = [step for step in steps if step.get("type") == "Strip"]
    if {"Replace", "ByteFallback"} <= set(types) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        if all((s.get("content"), s.get("start"), s.get("stop")) == (" ", 1, 0) for s in strips):
            return "sentencepiece", bool(strips)
    return "window", False


def _default_template(template: str | dict[str, str] | None) -> str | None:
    return template.get("default") if isinstance(template, dict) else template


def _read_template(template: str | None) -> str | None:
    """The template of a `--chat-template` value: text with Jinja in it is the template, anything else names a file."""
    if template is None or "{{" in template or "{%" in template:
        return template
    if not Path(template).is_file():
        raise ConfigError(f"--chat-template: there is no file {template}")
    return Path(template).read_text(encoding="utf-8")
