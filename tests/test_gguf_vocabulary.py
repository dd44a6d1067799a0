"""Tokenizers out of GGUF files against the tokenizers that the files were made from, and against transformers' own way
of reading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from gguf import GGUFValueType, GGUFWriter
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tandem.errors import ModelError
from tandem.gguf.container import read_gguf
from tandem.gguf.vocabulary import SPLITTINGS, end_tokens
from tandem.tokenizer import Detokenizer, Tokenizer

TEXTS = [
    "Hello world",
    " leading and  double   spaces\n\n\n and lines\r\n\tend. ",
    "It's WE'LL they'Re 12345 3.14159 x=1",
    "naïve café ＡＢ東京🙂👩‍👩‍👧 Ünïcode e\u0301",
    "<s>special</s> in <|end|> the text<|eot_id|>",
    "CamelCaseWords HTTPServer/path/",
    "",
]
CORPUS = [*TEXTS, Path(__file__).read_text(encoding="utf-8")]
SPECIAL = ["<unk>", "<s>", "</s>", "<|eot_id|>", "<|end|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


def write(path: Path, arch: str, said: dict[str, Any]) -> Path:
    """A GGUF file with this metadata under tokenizer, and no tensors."""
    writer = GGUFWriter(path, arch)
    for key, value in said.items():
        kind = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
        item = GGUFValueType.get_type(value[0]) if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(f"tokenizer.{key}", value, kind, item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def described(backend: Any, kind: str) -> dict[str, Any]:
    """What a converter writes of a trained tokenizer; the special tokens come first in it."""
    vocab = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab]
    kinds = [3 if token in SPECIAL else 6 if token.startswith("<0x") else 1 for token in tokens]
    return {
        "ggml.model": kind,
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "chat_template": TEMPLATE,
    }


def byte_level(pre: str) -> tuple[Any, dict[str, Any]]:
    """A byte-level tokenizer that splits as `pre` does (by transformers' word), and its metadata."""
    split = GGUF_PRE_TOKENIZER_SPLITS.get(pre)
    backend = Backend(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    steps = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return backend, described(backend, "gpt2") | {"ggml.pre": pre, "ggml.merges": merges}


def sentencepiece(prefix: bool) -> tuple[Any, dict[str, Any]]:
    """A SentencePiece-like tokenizer, and its metadata with scores and no merges."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    corpus = [word.replace(" ", "▁") for text in CORPUS for word in text.split("\n")]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIAL, *bytes_], limit_alphabet=80)
    backend.train_from_iterator(corpus, trainer)
    # Trained as special, so that they are there; matched in no text.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    backend = Backend.from_str(json.dumps(state))
    said = described(backend, "llama")
    said["ggml.scores"] = [-float(index) for index in range(len(said["ggml.tokens"]))]
    return backend, said | {"ggml.add_space_prefix": prefix}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o"])
def test_byte_level_tokenizers_are_those_the_file_was_made_from(tmp_path: Path, pre: str) -> None:
    backend, said = byte_level(pre)
    tokenizer = Tokenizer.load(str(write(tmp_path / "t.gguf", "llama", said)))
    for text in TEXTS:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert streamed(tokenizer, ids) == backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.style == "byte_level" and len(tokenizer) == backend.get_vocab_size()
    bos = [1] if pre in ("llama-bpe", "tekken") else []
    assert tokenizer.encode("a") == bos + tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_are_those_the_file_was_made_from(tmp_path: Path, prefix: bool) -> None:
    backend, said = sentencepiece(prefix)
    for arch in ("llama", "gemma2"):
        tokenizer = Tokenizer.load(str(write(tmp_path / f"{arch}.gguf", arch, said)))
        for text in TEXTS:
            ids = backend.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, add_special_tokens=False) == ids, text
            assert streamed(tokenizer, ids) == backend.decode(ids, skip_special_tokens=False)
        assert tokenizer.style == "sentencepiece" and tokenizer.strips_first_space == prefix
        assert tokenizer.encode("a")[0] == 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_reads_the_same_tokenizer(tmp_path: Path, kind: str) -> None:
    _, said = byte_level("llama-bpe") if kind == "gpt2" else sentencepiece(False)
    arch = "llama" if kind == "gpt2" else "gemma2"
    file = write(tmp_path / "t.gguf", arch, said)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="t.gguf")
    ours = Tokenizer.load(str(file))
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == expected, text
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    assert ours.eos_id == theirs.eos_token_id == 2


def test_flags_say_what_stands_around_a_text(tmp_path: Path) -> None:
    _, said = byte_level("gpt-2")
    for bos, eos in ((True, True), (False, True), (True, False), (False, False)):
        flags = {"ggml.add_bos_token": bos, "ggml.add_eos_token": eos}
        tokenizer = Tokenizer.load(str(write(tmp_path / "t.gguf", "llama", said | flags)))
        inner = tokenizer.encode("text", add_special_tokens=False)
        assert tokenizer.encode("text") == [1] * bos + inner + [2] * eos


def test_chat_template_and_special_tokens(tmp_path: Path) -> None:
    _, said = byte_level("llama-bpe")
    tokenizer = Tokenizer.load(str(write(tmp_path / "t.gguf", "llama", said)))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_text(messages) == "<s>hi</s>"
    assert tokenizer.render(messages) == [1, *tokenizer.encode("hi", add_special_tokens=False), 2]
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    own = Tokenizer.load(str(tmp_path / "t.gguf"), chat_template="{{ messages[0]['content'] }}")
    assert own.render_text(messages) == "hi"


def test_user_defined_tokens_are_matched_whole_and_shown(tmp_path: Path) -> None:
    _, said = sentencepiece(False)
    said["ggml.tokens"] = [*said["ggml.tokens"], "   ", "<think>"]
    said["ggml.token_type"] = [*said["ggml.token_type"], 4, 4]
    said["ggml.scores"] = [*said["ggml.scores"], -1000.0, -1000.0]
    tokenizer = Tokenizer.load(str(write(tmp_path / "t.gguf", "gemma3", said)))
    spaces, think = len(said["ggml.tokens"]) - 2, len(said["ggml.tokens"]) - 1
    ids = tokenizer.encode("a   b<think>", add_special_tokens=False)
    assert spaces in ids and ids[-1] == think
    assert tokenizer.decode(ids) == "a   b<think>" == streamed(tokenizer, ids)


def test_phi3_special_tokens_swallow_the_line_break_behind_them(tmp_path: Path) -> None:
    _, said = sentencepiece(True)
    phi3 = Tokenizer.load(str(write(tmp_path / "phi3.gguf", "phi3", said)))
    llama = Tokenizer.load(str(write(tmp_path / "llama.gguf", "llama", said)))
    text, without = "<|end|>\n hello", "<|end|>hello"
    assert phi3.encode(text) == phi3.encode(without) != llama.encode(text)
    assert phi3.encode("<s>\nhello") == llama.encode("<s>\nhello")


def test_end_tokens_are_named_and_known_ones(tmp_path: Path) -> None:
    _, said = byte_level("gpt-2")
    assert end_tokens(read_gguf(write(tmp_path / "a.gguf", "llama", said))) == [2, 3, 4]
    named = said | {"ggml.eot_token_id": 7}
    assert end_tokens(read_gguf(write(tmp_path / "b.gguf", "llama", named))) == [2, 7, 3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ggml.model": "t5"}, "tokenizer.ggml.model='t5' is not supported"),
        ({"ggml.pre": "chatglm-bpe"}, "tokenizer.ggml.pre='chatglm-bpe' is not supported"),
        ({"ggml.merges": ["ab"]}, "'ab', which is no pair"),
        ({"ggml.token_type": [1, 2]}, "one number for each of"),
        ({"ggml.tokens": [1, 2]}, "has no tokenizer"),
        ({"ggml.bos_token_id": 70000}, "bos_token_id=70000"),
        ({"ggml.merges": ["Qzz Qzy"]}, "cannot build its tokenizer"),
    ],
)
def test_what_cannot_be_built_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    _, said = byte_level("gpt-2")
    file = write(tmp_path / "t.gguf", "llama", said | change)
    with pytest.raises(ModelError, match=words) as refusal:
        Tokenizer.load(str(file))
    assert str(file) in str(refusal.value)


def test_splittings_agree_with_transformers() -> None:
    known = {name: s.patterns for name, s in SPLITTINGS.items() if name in GGUF_PRE_TOKENIZER_SPLITS and s.patterns}
    assert len(known) > 8
    for name, patterns in known.items():
        one, other = (
            pre_tokenizers.Split(Regex(pattern), "isolated")
            for pattern in (patterns[0], GGUF_PRE_TOKENIZER_SPLITS[name])
        )
        for text in CORPUS:
            assert one.pre_tokenize_str(text) == other.pre_tokenize_str(text), name


def test_metadata_equal_the_gguf_packages(tmp_path: Path) -> None:
    said = {"ggml.tokens": [f"token{i}" for i in range(3000)], "ggml.model": "gpt2"}
    found = read_gguf(write(tmp_path / "t.gguf", "llama", said)).metadata["tokenizer.ggml.tokens"]
    assert found == gguf.GGUFReader(tmp_path / "t.gguf").get_field("tokenizer.ggml.tokens").contents()
