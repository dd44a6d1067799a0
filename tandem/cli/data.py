"""`tandem data check`: what a training file holds and what of it is learnt, before anything is trained.

Needs no server and no torch; how rows become tokens is `tandem.finetune`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.cli import options
from tandem.config import DEMO_MODEL, option
from tandem.errors import ConfigError
from tandem.finetune.formats import FORMATS

if TYPE_CHECKING:
    from tandem.finetune.data import Dataset, Row
    from tandem.tokenizer import Tokenizer

BAR = 40
MAX_BINS = 8
MAX_LINES = 10
MAX_SHOWN_TOKENS = 1000
GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"


@dataclass(frozen=True)
class CheckOptions:
    """What the file is for."""

    model: str = option("demo", "Hugging Face directory or hub id whose tokenizer and chat template count")
    tokenizer: str | None = option(None, "tokenizer directory or hub id, if not the model's own")
    chat_template: str | None = option(None, "chat template file, instead of the model's own")
    format: str = option("auto", "format of the rows; auto: that of the first", choices=FORMATS)
    max_seq_len: int | None = option(None, "longest row in tokens (default: the model's context)", low=2)


def parser(prog: str) -> options.Parser:
    """The file, and which model it is for."""
    made = options.Parser(prog=prog, description="Check a training file and show what of it is learnt.")
    made.add_argument("file", metavar="FILE", help="JSONL (chat, completion, alpaca, sharegpt, text), .json or .txt")
    options.add(made, CheckOptions)
    return made


def run(namespace: argparse.Namespace) -> int:
    """Print the report; a file that cannot be trained on is an error (exit code 1) with its line."""
    (wanted,) = options.resolve(namespace, CheckOptions)
    from tandem.finetune import data
    from tandem.tokenizer import Tokenizer

    model = str(DEMO_MODEL) if wanted.model == "demo" else wanted.model
    tokenizer = Tokenizer.load(wanted.tokenizer or model, wanted.chat_template)
    limit = wanted.max_seq_len or context_of(model)
    path = Path(namespace.file)
    dataset = data.load(path, tokenizer, limit, wanted.format, str(path))
    shows_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for line in report(dataset, limit):
        print(line)
    print(f"\n{heading(dataset.rows[0], shows_colour)}\n{rendered(dataset.rows[0], tokenizer, shows_colour)}")
    return 0


def context_of(model: str) -> int:
    """The longest context of a model, from its config.json or GGUF file. Raises ConfigError where it does not say."""
    from tandem.gguf.container import read_gguf
    from tandem.hub import TOKENIZER_FILES, is_gguf, resolve_model

    where = resolve_model(model, None, TOKENIZER_FILES)
    path = where / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if is_gguf(where):
        gguf = read_gguf(where)
        fields = {"max_position_embeddings": gguf.metadata.get(f"{gguf.architecture}.context_length")}
    found = fields.get("max_position_embeddings") or fields.get("text_config", {}).get("max_position_embeddings")
    if not isinstance(found, int):
        raise ConfigError(f"{model} does not say how long its context is: give --max-seq-len N")
    return found


def report(dataset: Dataset, max_seq_len: int) -> Iterator[str]:
    """The lines above the example."""
    lengths = sorted(len(row.tokens) for row in dataset.rows)
    trained, total = dataset.num_trained_tokens, dataset.num_tokens
    yield f"format     {dataset.format}"
    yield f"rows       {len(lengths):,}"
    yield f"tokens     {total:,}, of which {trained:,} are learnt ({trained / total:.1%})"
    p95 = lengths[min(round(0.95 * (len(lengths) - 1)), len(lengths) - 1)]
    yield f"per row    min {lengths[0]}, median {statistics.median(lengths):g}, p95 {p95}, max {lengths[-1]}"
    yield from histogram(lengths)
    cut = [row.line for row in dataset.rows if row.is_truncated]
    if cut:
        shown = ", ".join(map(str, cut[:MAX_LINES])) + (", ..." if len(cut) > MAX_LINES else "")
        what = f"{len(cut):,} of {len(lengths):,} rows, cut at {max_seq_len} tokens (lines {shown})"
        yield f"truncated  {what}: raise --max-seq-len or shorten them"
    else:
        yield f"truncated  none (limit {max_seq_len} tokens)"
    for key, count in dataset.unused_keys.items():
        yield f"not used   {key!r}, in {count:,} rows"


def histogram(lengths: Sequence[int]) -> Iterator[str]:
    """A bar per range of row lengths; `lengths` is sorted."""
    low, high = lengths[0], lengths[-1]
    width = max(-(-(high - low + 1) // MAX_BINS), 1)
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    for i, count in enumerate(counts):
        first, last = low + i * width, min(low + (i + 1) * width - 1, high)
        name = f"{first}-{last}" if last > first else str(first)
        bar = "#" * round(BAR * count / max(counts)) or ("." if count else "")
        yield f"  {name:>11}  {bar} {count:,}" if count else f"  {name:>11}"


def heading(row: Row, shows_colour: bool) -> str:
    """What the example is and how its learnt tokens are marked."""
    how = "in colour" if shows_colour else "in [brackets]"
    return f"line {row.line}, what is learnt {how}:"


def rendered(row: Row, tokenizer: Tokenizer, shows_colour: bool) -> str:
    """The row's text with its learnt tokens marked."""
    from tandem.tokenizer import Detokenizer

    opened, closed = (GREEN, PLAIN) if shows_colour else ("[", "]")
    texts = Detokenizer(tokenizer, skip_special_tokens=False)
    written, is_open = [], False
    for token, weight in list(zip(row.tokens, row.mask, strict=True))[:MAX_SHOWN_TOKENS]:
        if (weight > 0) != is_open:
            written.append(texts.finish() + (closed if is_open else opened))
            is_open = not is_open
        written.append(_printable(texts.push(token)))
    written.append(texts.finish() + (closed if is_open else ""))
    left = len(row.tokens) - MAX_SHOWN_TOKENS
    return "".join(written) + (f"\n... and {left:,} more tokens" if left > 0 else "")


def _printable(text: str) -> str:
    """Without what would steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
