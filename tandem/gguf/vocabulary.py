"""The tokenizer inside a GGUF file: metadata -> a Hugging Face tokenizer with its chat template.

Two kinds: byte-level BPE ("gpt2": merges are in the file, how text is split first is a name) and SentencePiece BPE
("llama": merges follow from the vocabulary). Not here: encoding and decoding (`tandem/tokenizer.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from tandem.errors import ModelError
from tandem.gguf.container import Gguf

CONTROL, USER_DEFINED, UNUSED, BYTE = 3, 4, 5, 6
# Control tokens that end an answer whatever the file names as its end token.
ENDS = frozenset("<|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|>".split())
# Phi-3's special tokens swallow the white space behind them, except these.
_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


class Splitting(NamedTuple):
    """How a byte-level vocabulary cuts text before it merges: by `patterns`, one after the other, and by GPT-2's own
    where `gpt2` is set. `whole_words`: a piece that is a token is taken without merging. `nfc`: Unicode is composed."""

    patterns: tuple[str, ...] = ()
    gpt2: bool = False
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, digits: str) -> str:
    """Words split where capitals begin: Tekken and o200k."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return rf"{first}{_UPPER}*{_LOWER}+{ending}|{first}{_UPPER}+{_LOWER}*{ending}|{digits}|{_CASED_REST}"


SPLITTINGS: dict[str, Splitting] = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "olmo", "mpt"), Splitting(gpt2=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), Splitting((r"\p{N}",), gpt2=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), Splitting((_LLAMA3,), False, True, True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting((_LLAMA3,))),
    "qwen2": Splitting((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": Splitting((_QWEN2,)),
    "tekken": Splitting((_cased("", r"\p{N}"),), False, True, True),
    **dict.fromkeys(("gpt-4o", "llama4"), Splitting((_cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))),
}


def end_tokens(gguf: Gguf) -> list[int]:
    """Ids of the tokens that end an answer, the file's end token first; none where the file has no tokenizer."""
    if "tokenizer.ggml.tokens" not in gguf.metadata:
        return []
    named = [token_id(gguf, f"{name}_token_id") for name in ("eos", "eot", "eom")]
    known = [i for i, (token, kind) in enumerate(zip(*_tokens(gguf))) if kind == CONTROL and token in ENDS]
    return list(dict.fromkeys([i for i in named if i is not None] + known))


def token_id(gguf: Gguf, name: str) -> int | None:
    """A special token's id by its key under tokenizer.ggml, None where there is none. Raises ModelError."""
    value = gguf.metadata.get(f"tokenizer.ggml.{name}")
    # Files without the token write the largest number.
    if value is None or value == 2**32 - 1:
        return None
    count = len(_tokens(gguf)[0])
    if not isinstance(value, int) or not 0 <= value < count:
        raise ModelError(f"{gguf.path}: tokenizer.ggml.{name}={value!r} is none of the {count} tokens")
    return value


def load_tokenizer(gguf: Gguf) -> Any:
    """A transformers.PreTrainedTokenizerFast with the file's special tokens and chat template.

    Raises ModelError where the file has no tokenizer, or one of a kind that is not built here.
    """
    import transformers

    kind = gguf.metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in _BUILDERS:
        supported = ", ".join(_BUILDERS)
        raise ModelError(
            f"{gguf.path}: tokenizer.ggml.model={kind!r} is not supported (supported are {supported}): "
            "give --tokenizer DIR_OR_HUB_ID"
        )
    tokens, _ = _tokens(gguf)
    try:
        backend = _BUILDERS[kind](gguf)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library has no type of its own
        raise ModelError(f"{gguf.path}: cannot build its tokenizer ({error}): give --tokenizer DIR_OR_HUB_ID") from None
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: token_id(gguf, f"{key}_token_id") for name, key in names.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    template = gguf.metadata.get("tokenizer.chat_template")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _tokens(gguf: Gguf) -> tuple[list[str], list[int]]:
    """The vocabulary, and the kind of each token. Raises ModelError."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ModelError(f"{gguf.path} has no tokenizer (tokenizer.ggml.tokens): give --tokenizer DIR_OR_HUB_ID")
    kinds = gguf.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ModelError(
            f"{gguf.path}: tokenizer.ggml.token_type must hold one number for each of {len(tokens)} tokens"
        )
    return tokens, kinds


def _byte_level(gguf: Gguf) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = gguf.metadata.get("tokenizer.ggml.pre")
    splitting = SPLITTINGS.get(name)  # type: ignore[arg-type]
    if splitting is None:
        raise ModelError(
            f"{gguf.path}: tokenizer.ggml.pre={name!r} is not supported (supported are {', '.join(SPLITTINGS)}): "
            "give --tokenizer DIR_OR_HUB_ID"
        )
    tokens, _ = _tokens(gguf)
    merges = [_pair(gguf, merge) for merge in gguf.metadata.get("tokenizer.ggml.merges") or ()]
    model = models.BPE(vocab=_ids(tokens), merges=merges, ignore_merges=splitting.whole_words)
    backend = Tokenizer(model)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    split = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.gpt2)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, last])
    backend.decoder = decoders.ByteLevel()
    return _completed(backend, gguf, add_bos=splitting.add_bos)


def _sentencepiece(gguf: Gguf) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, _ = _tokens(gguf)
    unknown = token_id(gguf, "unknown_token_id") or 0
    model = models.BPE(
        vocab=_ids(tokens),
        merges=_merges(gguf),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gguf.metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return _completed(backend, gguf, add_bos=True)


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _ids(tokens: list[str]) -> dict[str, int]:
    """Of two tokens that are spelt the same the first, as llama.cpp finds it."""
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        ids.setdefault(token, index)
    return ids


def _pair(gguf: Gguf, merge: str) -> tuple[str, str]:
    # The first piece may itself begin with a space in files that did not escape it.
    at = merge.find(" ", 1)
    if at < 0:
        raise ModelError(f"{gguf.path}: tokenizer.ggml.merges has {merge!r}, which is no pair")
    return merge[:at], merge[at + 1 :]


def _merges(gguf: Gguf) -> list[tuple[str, str]]:
    """Which two pieces make which, most urgent first: in the order of the scores, in Gemma's vocabularies in that of
    the tokens (some of their scores do not follow it)."""
    if listed := gguf.metadata.get("tokenizer.ggml.merges"):
        return [_pair(gguf, merge) for merge in listed]
    tokens, kinds = _tokens(gguf)
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    by_order = gguf.architecture.startswith("gemma")
    if not by_order and (not isinstance(scores, list) or len(scores) != len(tokens)):
        raise ModelError(f"{gguf.path}: tokenizer.ggml.scores do not match the tokens: give --tokenizer DIR_OR_HUB_ID")
    ids = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind not in (CONTROL, USER_DEFINED, UNUSED, BYTE)}
    found: list[tuple[float, int, int, int, str, str]] = []
    for token, index in ids.items():
        urgency = index if by_order else -scores[index]  # type: ignore[index]
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ids and right in ids:
                found.append((urgency, index, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _completed(backend: Any, gguf: Gguf, add_bos: bool) -> Any:
    """With the tokens that are matched whole, and what stands around every text."""
    from tokenizers import AddedToken, processors

    tokens, kinds = _tokens(gguf)
    strips = gguf.architecture == "phi3" and gguf.metadata.get("tokenizer.ggml.model") == "llama"
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL, rstrip=strips and token not in _KEEPS_SPACE)
        for token, kind in zip(tokens, kinds)
        if kind in (CONTROL, USER_DEFINED) and token
    ]
    backend.add_tokens(added)
    around = []
    for name, default in (("bos", add_bos), ("eos", False)):
        wanted = gguf.metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        index = token_id(gguf, f"{name}_token_id")
        around.append((tokens[index], index) if wanted and index is not None else None)
    if any(around):
        before, after = around
        template = [*([before[0]] if before else []), "$A", *([after[0]] if after else [])]
        backend.post_processor = processors.TemplateProcessing(
            single=template, pair=None, special_tokens=list(dict.fromkeys(filter(None, around)))
        )
    return backend
