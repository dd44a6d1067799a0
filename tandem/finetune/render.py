"""What a row is to the model: its text, which characters of it are learnt, and from these its tokens and mask.

Chats go through the tokenizer's chat template, exactly as requests do. Knows no files and no lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tandem.errors import InvalidRequest
from tandem.finetune.formats import Chat, Plain
from tandem.tokenizer import Tokenizer

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Marked:
    """A text and its character ranges to learn. `is_chat`: a template wrote it, with all its special tokens."""

    text: str
    spans: list[Span]
    is_chat: bool
    by_template: bool = False


def mark(sample: Chat | Plain, tokenizer: Tokenizer) -> Marked:
    """The sample as text. Raises InvalidRequest where the template refuses it or hides which text is the model's."""
    if isinstance(sample, Plain):
        text = sample.prompt + sample.text
        marked = Marked(text, [(len(sample.prompt), len(text))], is_chat=False)
    elif tokenizer.chat_template is None:
        raise InvalidRequest("the model has no chat template: use completion or text rows, or give it one")
    elif tokenizer.marks_generation:
        text, spans = tokenizer.render_spans(sample.messages, sample.tools)
        marked = Marked(text, _wanted(sample, text, spans, tokenizer), is_chat=True, by_template=True)
    else:
        text = _render(sample, len(sample.messages), tokenizer)
        spans = [_turn(sample, i, text, tokenizer) for i in sample.trained]
        marked = Marked(text, spans, is_chat=True)
    try:
        marked.text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequest("is not valid Unicode: it contains lone surrogates (\\ud800 to \\udfff)") from e
    return marked


def encode(marked: Sequence[Marked], tokenizer: Tokenizer) -> list[tuple[list[int], list[Span]]]:
    """Token ids and the token ranges to learn, for texts that are all chats or all plain."""
    if not marked:
        return []
    is_chat = marked[0].is_chat
    encodings = tokenizer.encode_batch([m.text for m in marked], add_special_tokens=not is_chat)
    if is_chat:
        return [_chat_tokens(m, encoding, tokenizer) for m, encoding in zip(marked, encodings, strict=True)]
    return [_plain_tokens(m, encoding, tokenizer) for m, encoding in zip(marked, encodings, strict=True)]


# ---------------------------------------------------------------- which characters


def _wanted(sample: Chat, text: str, spans: list[Span], tokenizer: Tokenizer) -> list[Span]:
    """The template's own ranges, less those of turns with weight 0."""
    turns = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
    left_out = [i for i in turns if i not in sample.trained]
    if not left_out:
        return spans
    if len(spans) == len(turns):
        return [span for i, span in zip(turns, spans, strict=True) if i in sample.trained]
    unwanted = [_turn(sample, i, text, tokenizer) for i in left_out]
    return [span for span in spans if not any(start <= span[0] < stop for start, stop in unwanted)]


def _turn(sample: Chat, i: int, text: str, tokenizer: Tokenizer) -> Span:
    """Where message `i` of the rendered conversation is, by what rendering with and without it differs in."""
    if i == 0:
        raise InvalidRequest("the first message is the assistant's: begin with a user or system message")
    before = _render(sample, i, tokenizer, add_generation_prompt=True)
    upto = _render(sample, i + 1, tokenizer)
    if not (text.startswith(before) and upto.startswith(before)):
        raise InvalidRequest(
            f"the chat template does not render messages[{i}] after the prompt that it is the answer to, so what to "
            "learn cannot be told apart: mark it with {% generation %} in the template"
        )
    if text.startswith(upto):
        return len(before), len(upto)
    # Templates may drop the beginning of an earlier answer (its reasoning) once other turns follow.
    alone, rest, content = upto[len(before) :], text[len(before) :], sample.messages[i]["content"].strip()
    latest = alone.rfind(content) if content else -1
    for at in range(1, latest + 1):
        if rest.startswith(alone[at:]):
            return len(before), len(before) + len(alone) - at
    raise InvalidRequest(
        f"the chat template renders messages[{i}] otherwise when other messages follow, so what to learn cannot be "
        "told apart: give that turn weight 0, or one row per answer, or {% generation %} marks in the template"
    )


def _render(sample: Chat, count: int, tokenizer: Tokenizer, add_generation_prompt: bool = False) -> str:
    return tokenizer.render_text(sample.messages[:count], sample.tools, add_generation_prompt=add_generation_prompt)


# ---------------------------------------------------------------- which tokens


def _chat_tokens(marked: Marked, encoding: Any, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
    ids = encoding.ids
    ranges = [_token_range(span, encoding, len(marked.text)) for span in marked.spans]
    if marked.by_template:
        return ids, _with_ends(ids, ranges, tokenizer)
    return ids, [_without_space(ids, found, tokenizer) for found in ranges]


def _plain_tokens(marked: Marked, encoding: Any, tokenizer: Tokenizer) -> tuple[list[int], list[Span]]:
    if tokenizer.eos_id is None:
        raise InvalidRequest("the model's tokenizer names no end-of-text token (eos_token): use a chat format")
    ids = encoding.ids
    start, _ = _token_range(marked.spans[0], encoding, len(marked.text))
    if not ids or ids[-1] != tokenizer.eos_id:
        ids = [*ids, tokenizer.eos_id]
    return ids, [(start, len(ids))]


def _token_range(span: Span, encoding: Any, num_chars: int) -> Span:
    """The tokens that have characters of the range; one that straddles an end counts."""
    start, stop = (_first_token(at, encoding, num_chars) for at in span)
    if stop < len(encoding.ids) and span[0] < span[1] and (encoding.token_to_chars(stop) or span)[0] < span[1]:
        stop += 1
    return start, stop


def _first_token(at: int, encoding: Any, num_chars: int) -> int:
    """The first token from character `at` on; characters that tokenizers drop (spaces) belong to none."""
    while at < num_chars:
        token = encoding.char_to_token(at)
        if token is not None:
            return token
        at += 1
    return len(encoding.ids)


def _with_ends(ids: list[int], ranges: list[Span], tokenizer: Tokenizer) -> list[Span]:
    """Ranges with the token that ends a turn, for templates that write it after their {% generation %} block."""
    stop = ranges[-1][1] if ranges else len(ids)
    end = ids[stop] if stop < len(ids) and ids[stop] in tokenizer.special_ids else None
    return [
        (a, b + 1) if end is not None and b < len(ids) and ids[b] == end and ids[b - 1] != end else (a, b)
        for a, b in ranges
    ]


def _without_space(ids: list[int], found: Span, tokenizer: Tokenizer) -> Span:
    """The range without line breaks after the token that ends the turn: a model stops before them."""
    start, stop = found
    last = stop
    while last > start and not tokenizer.token_bytes(ids[last - 1]).strip():
        last -= 1
    return (start, last) if last > start and ids[last - 1] in tokenizer.special_ids else found
