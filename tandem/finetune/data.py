"""From a training file to what the engine learns from: rows of token ids with a weight for each.

Checks everything before the first step, so that a job fails at its start and not in its middle. No torch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from tandem.errors import DataError, InvalidRequest
from tandem.finetune import files, formats, preferences, prompts, render
from tandem.tokenizer import Tokenizer
from tandem.work import Example

T = TypeVar("T")

# Rows that are encoded together: enough for all cores, few enough that a large file needs little memory at once.
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence. `mask[i]` is the weight of token i being predicted; the first is 0, nothing predicts it.

    `line` is where the row begins in its file; `is_truncated` says that its end was cut off.
    """

    tokens: list[int]
    mask: list[float]
    line: int
    is_truncated: bool = False

    @property
    def num_trained_tokens(self) -> int:
        return sum(weight > 0 for weight in self.mask)


@dataclass(frozen=True)
class Dataset:
    """A checked training file. `unused_keys` counts the rows that had each key which training does not look at.

    `group_size` rows in a row belong together: with preferences, the preferred answer and then the other. Rows that are
    prompts have nothing to learn yet; `items` are then the file's rows as they stand there, for graders.
    """

    format: str
    rows: list[Row]
    unused_keys: dict[str, int] = field(default_factory=dict)
    group_size: int = 1
    items: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_groups(self) -> int:
        """What an epoch goes through."""
        return len(self.rows) // self.group_size

    def group(self, number: int) -> list[Row]:
        """The rows that belong together."""
        return self.rows[number * self.group_size : (number + 1) * self.group_size]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    @property
    def num_trained_tokens(self) -> int:
        return sum(row.num_trained_tokens for row in self.rows)

    @property
    def num_truncated(self) -> int:
        return sum(row.is_truncated for row in self.rows)


def load(path: Path, tokenizer: Tokenizer, max_seq_len: int, format: str = "auto", name: str | None = None) -> Dataset:
    """Read, check and encode a training file; `name` is what errors call it (and whose ending tells its kind).

    Rows longer than `max_seq_len` tokens are cut at the end; a .txt file is one text, cut into rows of that length.
    Raises DataError "NAME:LINE: what is wrong", InvalidRequest for an unknown `format`.
    """
    if format not in formats.FORMATS:
        raise InvalidRequest(f"unknown data format {format!r}: use one of {', '.join(formats.FORMATS)}", "format")
    if max_seq_len < 2:
        raise InvalidRequest(f"max_seq_len must be at least 2 (one token read, one learnt), not {max_seq_len}")
    name = name or path.name
    values = files.read(path, name)
    line, first = next(values)
    found = _at(name, line, formats.detect, first) if format == "auto" else format
    ids: dict[int, int] = {}
    rows: list[Row] = []
    unused: Counter[str] = Counter()
    for chunk in _chunks(itertools.chain([(line, first)], values)):
        marked = []
        for line, value in chunk:
            marked.append(_at(name, line, _marked, value, found, format == "auto", tokenizer))
            unused.update(formats.unused_keys(value, found))
        encoded = _at(name, chunk[0][0], render.encode, marked, tokenizer)
        for (line, value), (tokens, ranges) in zip(chunk, encoded, strict=True):
            # The same integers for all rows: a token then costs one pointer.
            tokens = [ids.setdefault(token, token) for token in tokens]
            if isinstance(value, files.Document):
                rows.extend(_pieces(tokens, max_seq_len, tokenizer))
            else:
                rows.append(_at(name, line, _row, tokens, ranges, line, max_seq_len))
    return Dataset(found, rows, dict(unused))


def load_preferences(path: Path, tokenizer: Tokenizer, max_seq_len: int, name: str | None = None) -> Dataset:
    """Read, check and encode a file of preferences; as `load`, with two rows for each of the file's."""
    name = name or path.name
    ids: dict[int, int] = {}
    rows: list[Row] = []
    unused: Counter[str] = Counter()
    for chunk in _chunks(files.read(path, name)):
        marked, lines = [], []
        for line, value in chunk:
            for chat in _at(name, line, preferences.convert, value):
                marked.append(_at(name, line, render.mark, chat, tokenizer))
                lines.append(line)
            unused.update(preferences.unused_keys(value))
        for line, (tokens, ranges) in zip(lines, render.encode(marked, tokenizer), strict=True):
            tokens = [ids.setdefault(token, token) for token in tokens]
            rows.append(_at(name, line, _row, tokens, ranges, line, max_seq_len))
    return Dataset("preference", rows, dict(unused), group_size=2)


def load_prompts(
    path: Path, tokenizer: Tokenizer, max_seq_len: int, max_tokens: int, check_item: Callable[[Any], None],
    name: str | None = None,
) -> Dataset:  # fmt: skip
    """Read, check and encode a file of prompts, which leave room for answers of `max_tokens`. `check_item` raises
    InvalidRequest for a row that its grader cannot use. Raises as `load`."""
    name = name or path.name
    rows: list[Row] = []
    items: list[dict[str, Any]] = []
    for line, value in files.read(path, name):
        messages, tools = _at(name, line, prompts.convert, value)
        _at(name, line, check_item, value)
        tokens = _at(name, line, tokenizer.render, messages, tools)
        _at(name, line, prompts.check_length, len(tokens), max_tokens, max_seq_len)
        rows.append(Row(tokens, [0.0] * len(tokens), line))
        items.append(value)
    return Dataset("prompts", rows, items=items)


def example(row: Row, scale: float) -> Example:
    """The row as the engine takes it: each token read, the next one predicted with its weight times `scale`."""
    return Example(row.tokens[:-1], row.tokens[1:], [weight * scale for weight in row.mask[1:]])


def order(num_rows: int, epoch: int, seed: int) -> list[int]:
    """The rows' order in an epoch: a permutation of 0..num_rows-1 that depends on the arguments alone."""
    shuffled = list(range(num_rows))
    Random(f"{seed}/{epoch}").shuffle(shuffled)
    return shuffled


def _marked(value: Any, format: str, is_detected: bool, tokenizer: Tokenizer) -> render.Marked:
    if is_detected and (other := formats.detect(value)) != format:
        raise InvalidRequest(f"is {other}, but the file's first row is {format}: keep one format per file")
    return render.mark(formats.convert(value, format), tokenizer)


def _row(tokens: list[int], ranges: list[render.Span], line: int, max_seq_len: int) -> Row:
    mask = [0.0] * len(tokens)
    for start, stop in ranges:
        mask[start:stop] = [1.0] * (stop - start)
    mask[:1] = [0.0]
    if not any(mask):
        raise InvalidRequest("has no token to learn: the assistant's text is empty")
    if not any(mask[:max_seq_len]):
        first = mask.index(1.0)
        raise InvalidRequest(
            f"has no token to learn in its first {max_seq_len} (the first is token {first + 1} of {len(tokens)}): "
            "raise max_seq_len or shorten the row"
        )
    return Row(tokens[:max_seq_len], mask[:max_seq_len], line, len(tokens) > max_seq_len)


def _pieces(tokens: list[int], length: int, tokenizer: Tokenizer) -> Iterator[Row]:
    """A long text in rows of `length` tokens. Each begins with the last one's end, so that every token is learnt."""
    line = 1
    for start in range(0, len(tokens) - 1, length - 1):
        piece = tokens[start : start + length]
        yield Row(piece, [0.0] + [1.0] * (len(piece) - 1), line)
        line += tokenizer.decode(piece[:-1], skip_special_tokens=False).count("\n")


def _chunks(values: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    values = iter(values)
    while chunk := list(itertools.islice(values, _CHUNK)):
        yield chunk


def _at(name: str, line: int, act: Callable[..., T], *args: Any) -> T:
    """act(*args), with file and line before the message of what it refuses."""
    try:
        return act(*args)
    except DataError:
        raise
    except InvalidRequest as e:
        raise DataError(f"{name}:{line}: {e}") from e
