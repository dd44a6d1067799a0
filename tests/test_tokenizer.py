"""Token-by-token decoding and stop strings against decoding everything at once; chat templates against transformers."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tandem.errors import ConfigError, InvalidRequest, ModelError
from tandem.tokenizer import Detokenizer, StopMatcher, Tokenizer

CORPUS = ["the quick brown fox, naïve 東京 says: 🙂 hello\n\n42 + 17", "stop words and ▁ signs <|im_end|> END"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|end|>", "<|begin▁é|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece(strip: bool) -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if strip else []), normalizers.Replace(" ", "▁")]
    )
    tail = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "<|end|>", *bytes_])
    backend.train_from_iterator([CORPUS[0].replace(" ", "▁")], trainer)
    # The byte tokens are ordinary vocabulary, not special tokens: rebuild with only the three special ones.
    data = json.loads(backend.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < 3]
    return Backend.from_str(json.dumps(data))


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"]))
    return backend


def wrap(backend: Backend, template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", chat_template=template))


BYTE_LEVEL, SP_STRIP, SP_PLAIN = wrap(byte_level()), wrap(sentencepiece(True)), wrap(sentencepiece(False))
WORDS = wrap(word_piece())
ALL = {"byte_level": BYTE_LEVEL, "sp_strip": SP_STRIP, "sp_plain": SP_PLAIN, "words": WORDS}


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool, context=()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, context)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def test_the_styles_are_recognised():
    assert [t.style for t in ALL.values()] == ["byte_level", "sentencepiece", "sentencepiece", "window"]
    assert SP_STRIP.strips_first_space and not SP_PLAIN.strips_first_space


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(BYTE_LEVEL) + 5), max_size=40), st.booleans())
def test_byte_level_pieces_of_random_ids_equal_the_full_decode(ids, skip):
    assert "".join(pieces(BYTE_LEVEL, ids, skip)) == BYTE_LEVEL.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), name=st.sampled_from(["byte_level", "sp_strip", "sp_plain"]))
def test_pieces_of_any_text_equal_the_full_decode_and_hold_no_half_character(text, name):
    tokenizer = ALL[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = pieces(tokenizer, ids, False)
    assert "".join(shown) == tokenizer.decode(ids, False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(259, len(SP_STRIP) - 1), min_size=1, max_size=20))
def test_sentencepiece_random_ids_without_bytes_equal_the_full_decode(ids):
    for tokenizer in (SP_STRIP, SP_PLAIN):
        assert "".join(pieces(tokenizer, ids, True)) == tokenizer.decode(ids, True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("the quick brown fox , stop words signs 42 .".split()), max_size=20))
def test_window_decoding_equals_the_full_decode(words):
    ids = WORDS.encode(" ".join(words), add_special_tokens=False)
    assert "".join(pieces(WORDS, ids, False)) == WORDS.decode(ids, False)


def test_emoji_comes_out_once_and_whole():
    ids = BYTE_LEVEL.encode("👩‍👩‍👧", add_special_tokens=False)
    assert len(ids) > 4
    shown = [piece for piece in pieces(BYTE_LEVEL, ids, True) if piece]
    assert "".join(shown) == "👩‍👩‍👧" and all("\ufffd" not in piece for piece in shown)


def test_an_unfinished_character_shows_at_the_end():
    ids = BYTE_LEVEL.encode("🙂", add_special_tokens=False)[:-1]
    shown = pieces(BYTE_LEVEL, ids, True)
    assert "".join(shown[:-1]) == "" and shown[-1] == BYTE_LEVEL.decode(ids) == "\ufffd"


@pytest.mark.parametrize("name", ["sp_strip", "words"])
def test_a_continued_text_keeps_its_leading_space(name):
    tokenizer = ALL[name]
    whole = tokenizer.encode("fox the 42 fox hello the fox", False)
    starts = [k for k in range(1, len(whole)) if tokenizer.decode(whole)[len(tokenizer.decode(whole[:k])) :][0] == " "]
    assert starts
    for k in starts:
        rest = "".join(pieces(tokenizer, whole[k:], True, context=whole[:k]))
        assert rest == tokenizer.decode(whole)[len(tokenizer.decode(whole[:k])) :]


def test_token_bytes_and_text():
    ids = BYTE_LEVEL.encode("é🙂 fox", add_special_tokens=False)
    assert b"".join(map(BYTE_LEVEL.token_bytes, ids)).decode() == "é🙂 fox"
    assert BYTE_LEVEL.token_text(BYTE_LEVEL.encode("🙂", False)[0]) == "\ufffd"
    assert BYTE_LEVEL.token_text(2) == "<|begin▁é|>"
    assert SP_STRIP.token_bytes(3 + 0x41) == b"A"
    assert BYTE_LEVEL.token_bytes(10**6) == b""


# ---- stop strings

STOPS = st.lists(st.text("ab<|>", min_size=1, max_size=4), min_size=1, max_size=3)


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first moment at which the text so far ends with a stop string."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(text=st.text("ab<|>", max_size=20), stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 20)))
def test_stop_strings_are_found_for_every_split(text, stops, include, cuts):
    edges = sorted({0, len(text), *(c for c in cuts if c <= len(text))})
    matcher = StopMatcher(stops, include)
    shown = "".join(matcher.push(text[a:b]) for a, b in zip(edges, edges[1:], strict=False)) + matcher.finish()
    assert (shown, matcher.matched) == oracle(text, stops, include)


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["<|end|>"])
    assert [matcher.push(p) for p in ("ab", "c<", "|e", "x", "<|end", "|>tail")] == ["ab", "c", "", "<|ex", "", ""]
    assert matcher.matched == "<|end|>" and matcher.push("more") == matcher.finish() == ""


# ---- chat templates and loading


def test_render_equals_transformers():
    messages = [{"role": "user", "content": "hello 🙂"}]
    want = BYTE_LEVEL._hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert BYTE_LEVEL.render(messages) == want
    opened = BYTE_LEVEL.render(
        [*messages, {"role": "assistant", "content": "Well"}], add_generation_prompt=False, continue_final_message=True
    )
    assert BYTE_LEVEL.decode(opened, False).endswith("<|assistant|>Well")


def test_developer_messages_become_system_where_the_template_has_no_such_role():
    text = BYTE_LEVEL.decode(BYTE_LEVEL.render([{"role": "developer", "content": "hi"}]), False)
    assert "<|system|>hi" in text


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: wrap(byte_level(), None).render([{"role": "user", "content": "x"}]), "--chat-template"),
        (lambda t: t.render([{"role": "user"}], chat_template="{{ raise_exception('no users') }}"), "no users"),
        (lambda t: t.render([{"role": "user"}], chat_template="{{ 1 / 0 }}"), "chat template"),
        (lambda t: t.render([{"role": "user"}], chat_template="{% for"), "chat template"),
        (lambda t: t.render([], chat_template_kwargs={"tokenize": True}), "tokenize"),
        (lambda t: t.render([{"role": "user", "content": "x"}], tools=[{"type": "function"}]), "does not take tools"),
        (lambda t: t.encode("\ud800"), "Unicode"),
    ],
)
def test_what_cannot_be_rendered_is_an_invalid_request(call, says):
    with pytest.raises(InvalidRequest, match=says):
        call(BYTE_LEVEL)


MARKED = TEMPLATE.replace("{{ m.content }}<|end|>", "{%- generation -%}{{ m.content }}<|end|>{%endgeneration%}")


def test_generation_spans_are_the_marked_parts_of_the_text():
    tokenizer = wrap(byte_level(), MARKED)
    assert tokenizer.marks_generation and not BYTE_LEVEL.marks_generation
    messages = [{"role": "developer", "content": "hi", "name": None}, {"role": "assistant", "content": "naïve 🙂"}]
    text, spans = tokenizer.render_spans(messages)
    assert text == tokenizer.render_text(messages, add_generation_prompt=False)
    assert text == BYTE_LEVEL.render_text(messages, add_generation_prompt=False)
    assert [text[start:stop] for start, stop in spans] == ["hi<|end|>", "naïve 🙂<|end|>"]
    with pytest.raises(InvalidRequest, match="does not take tools"):
        tokenizer.render_spans(messages, [{"type": "function"}])
    with pytest.raises(InvalidRequest, match="refuses"):
        wrap(byte_level(), MARKED + "{{ 1 / 0 }}").render_spans(messages)


def test_batches_are_encoded_as_single_texts_are():
    texts = ["", "hello 🙂", "stop words"]
    assert [e.ids for e in BYTE_LEVEL.encode_batch(texts)] == [BYTE_LEVEL.encode(text) for text in texts]
    with pytest.raises(InvalidRequest, match="Unicode"):
        BYTE_LEVEL.encode_batch(["fine", "\ud800"])


def test_load_round_trip_and_template_override(tmp_path):
    BYTE_LEVEL._hf.save_pretrained(tmp_path)
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.encode("hello 🙂") == BYTE_LEVEL.encode("hello 🙂")
    assert loaded.chat_template == TEMPLATE and len(loaded) == len(BYTE_LEVEL)
    (tmp_path / "my.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer.load(str(tmp_path), str(tmp_path / "my.jinja")).chat_template == "{{ messages[0].content }}"
    assert Tokenizer.load(str(tmp_path), "{{ 1 }}").chat_template == "{{ 1 }}"
    with pytest.raises(ConfigError, match="no file"):
        Tokenizer.load(str(tmp_path), "missing.jinja")


def test_a_directory_without_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="--tokenizer"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelError, match="--tokenizer"):
        Tokenizer.load(str(tmp_path))


def test_neither_import_nor_load_needs_torch(tmp_path):
    BYTE_LEVEL._hf.save_pretrained(tmp_path)
    code = (
        "import sys, tandem.tokenizer as t; assert 'transformers' not in sys.modules;"
        f"t.Tokenizer.load({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
