"""GGUF files against the same numbers in safetensors run by transformers, against transformers' own GGUF reader, and
block by block against the `gguf` package; every defect is named."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import gguf_files
import pytest
import tiny_adapters
import tiny_models
import torch
import transformers
from gguf import GGMLQuantizationType, quants
from paged import Paged, load_decoder

from tandem.errors import ModelError
from tandem.gguf.container import BLOCKS, read_gguf
from tandem.model.export import merge_adapter
from tandem.model.gguf_blocks import dequantize
from tandem.model.rope import rope_frequencies
from tandem.model.spec import load_spec
from tandem.tokenizer import Tokenizer

TinyModel = Callable[[str], Path]
BF16 = torch.bfloat16
TOLERANCE = 2e-4  # float32, for logits whose largest are around 10
# Of these the tiny models have what GGUF cannot say; the overrides take it out.
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}


@pytest.fixture(scope="session")
def converted(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """converted("llama", "Q8_0") -> a GGUF file; its numbers as a Hugging Face directory are in `plain` beside it."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, kind: str = "F32") -> Path:
        if (family, kind) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{kind}")
            if family in OVERRIDES:
                source = tiny_models.build(family, folder / "source", **OVERRIDES[family])
            else:
                source = tiny_model(family)
            made[family, kind] = gguf_files.convert(source, folder, kind)
        return made[family, kind]

    return get


@torch.inference_mode()
def same_logits(file: Path, **options: Any) -> None:
    tokens = torch.randint(3, 250, (75,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = tiny_models.oracle(file.parent / "plain")(torch.tensor([tokens])).logits[0]
    found = Paged(load_decoder(file, **options)).step({"a": tokens})["a"]
    assert 4 < expected.abs().max() < 100, "the tolerance is meant for logits of this size"
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_logits_equal_transformers_on_the_same_numbers(converted: Callable[..., Path], family: str) -> None:
    same_logits(converted(family))


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES))
def test_the_spec_is_that_of_the_directory(converted: Callable[..., Path], family: str) -> None:
    file = converted(family)
    found, expected = load_spec(file), load_spec(file.parent / "plain")
    assert found.query_scale == pytest.approx(expected.query_scale, rel=1e-6)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(rope_frequencies(ours.rope), rope_frequencies(theirs.rope)) if ours.rope else None
        assert (ours.window, ours.rope is None) == (theirs.window, theirs.rope is None)
        assert ours.rope is None or ours.rope.scale == pytest.approx(theirs.rope.scale, rel=1e-6)
    assert replace(found, query_scale=1, layers=()) == replace(expected, query_scale=1, layers=())


# What transformers does not read from the file has the value here that it then assumes.
ASSUMED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 128},
    "gemma2": {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {
        "query_pre_attn_scalar": 256,
        "rope_parameters": None,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "phi3": {},
}


@pytest.mark.parametrize("family", ASSUMED)
@torch.inference_mode()
def test_logits_equal_transformers_reading_the_file(tmp_path: Path, family: str) -> None:
    file = gguf_files.convert(tiny_models.build(family, tmp_path / "source", **ASSUMED[family]), tmp_path, "Q8_0")
    tokens = list(range(3, 9))  # shorter than any window, of which its reader knows nothing
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    expected = model.eval()(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(load_logits(file, tokens), expected, rtol=0, atol=TOLERANCE)


def load_logits(file: Path, tokens: list[int]) -> torch.Tensor:
    return Paged(load_decoder(file)).step({"a": tokens})["a"]


@pytest.mark.parametrize("kind", [name for name, _, _ in BLOCKS.values()])
def test_blocks_equal_the_gguf_package(kind: str) -> None:
    type_ = GGMLQuantizationType[kind]
    if kind in gguf_files.SCALES:
        blocks = gguf_files.random_blocks(kind, 100)
    else:
        weights = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).numpy()
        blocks = gguf_files.encode(weights, kind, 0).view("uint8").reshape(-1, _bytes_of(kind))
    expected = quants.dequantize(blocks, type_).reshape(len(blocks), -1)
    assert torch.equal(dequantize(torch.from_numpy(blocks), kind).float(), torch.from_numpy(expected))
    assert len(set(expected.flatten().tolist())) > 100


def _bytes_of(kind: str) -> int:
    return next(nbytes for name, _, nbytes in BLOCKS.values() if name == kind)


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q5_1", "Q8_0"])
def test_quantised_files_give_the_logits_of_their_numbers(converted: Callable[..., Path], kind: str) -> None:
    same_logits(converted("llama", kind))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quantised_files_give_the_logits_of_their_numbers(tmp_path: Path, kind: str) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    source = tiny_models.build("llama-tied", tmp_path / "source", **wide)
    file = gguf_files.convert(source, tmp_path, kind)
    tokens = list(range(3, 40))
    with torch.inference_mode():
        expected = tiny_models.oracle(tmp_path / "plain")(torch.tensor([tokens])).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(load_logits(file, tokens), expected, rtol=0, atol=4e-5 * expected.abs().max().item())


def test_bfloat16_is_the_rounded_float32(converted: Callable[..., Path]) -> None:
    exact, rounded = load_decoder(converted("gemma2", "Q8_0")), load_decoder(converted("gemma2", "Q8_0"), dtype=BF16)
    embedding_VD = rounded.kernels.unpack(rounded.weights.embedding)
    assert torch.equal(exact.weights.embedding.weight.to(BF16), embedding_VD)
    assert torch.equal(exact.weights.layers[1].input_norm.to(BF16), rounded.weights.layers[1].input_norm)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("Q8_0", "bfloat16")])
def test_the_dtype_is_that_of_the_matrices(converted: Callable[..., Path], kind: str, dtype: str) -> None:
    assert load_spec(converted("llama", kind)).dtype == dtype


def test_query_scale_where_the_file_does_not_say_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    left_out = {"gemma2.attention.scale": (None, None)}
    spec = load_spec(gguf_files.convert(tiny_model("gemma2"), tmp_path / "small", metadata=left_out))
    assert spec.query_scale == pytest.approx(32**-0.5)
    many = tiny_models.build("gemma2", tmp_path / "many", num_hidden_layers=46, hidden_size=32, intermediate_size=32)
    spec = load_spec(gguf_files.convert(many, tmp_path / "large", metadata=left_out))
    assert spec.query_scale == pytest.approx((32 / 4) ** -0.5)


def test_llama3_scaling_is_recognised(tiny_model: TinyModel, tmp_path: Path) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = llama3 | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}
    source = tiny_models.build("llama", tmp_path / "source", rope_parameters=rope, max_position_embeddings=131072)
    assert load_spec(gguf_files.convert(source, tmp_path)).layers == load_spec(source).layers


def test_longrope_takes_the_long_factors_for_a_long_context(converted: Callable[..., Path]) -> None:
    file = converted("phi3-longrope")
    for length in (32, 33):
        found, expected = (load_spec(path, length).layers[0].rope for path in (file, file.parent / "plain"))
        assert found.factors == pytest.approx(expected.factors)
    assert load_spec(file, 32).layers[0].rope.factors != load_spec(file, 33).layers[0].rope.factors


@pytest.mark.parametrize("family", ["llama-llama3", "gemma3", "phi3-longrope", "qwen3"])
def test_an_adapter_merges_into_a_gguf_base(converted: Callable[..., Path], tmp_path: Path, family: str) -> None:
    file, merged = converted(family), tmp_path / "merged"
    adapter = tiny_adapters.build(file.parent / "plain", tmp_path / "adapter", target_modules="all-linear")
    merge_adapter(file, adapter, merged)
    prompt = list(range(3, 60))
    expected = tiny_adapters.logprobs(file.parent / "plain", adapter, prompt)
    with torch.inference_mode():
        found = tiny_models.oracle(merged)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    ours = load_logits(merged, prompt).log_softmax(-1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    assert tokenizer.encode("Hello") == tiny_models.tokenizer().encode("Hello")
    assert tokenizer.chat_template == tiny_models.CHAT_TEMPLATE


def test_a_large_merge_is_written_in_several_files(
    converted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = converted("llama", "Q8_0")
    adapter = tiny_adapters.build(file.parent / "plain", tmp_path / "adapter")
    monkeypatch.setattr("tandem.model.export.FILE_BYTES", 50_000)
    merge_adapter(file, adapter, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    prompt = list(range(3, 30))
    expected = tiny_adapters.logprobs(file.parent / "plain", adapter, prompt)
    found = load_logits(tmp_path / "merged", prompt).log_softmax(-1)
    assert (found - expected).abs().mean() < 0.1  # the file's dtype is bfloat16
    assert expected.std() > 1


def edited(file: Path, target: Path, at: int, content: bytes) -> Path:
    data = bytearray(file.read_bytes())
    data[at : at + len(content)] = content
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("at", "content", "words"),
    [
        (0, b"GGML", "not a GGUF file"),
        (0, b"tjgg", "older than GGUF"),
        (4, struct.pack(">I", 3), "big-endian"),
        (4, struct.pack("<I", 1), "version 1"),
        (8, struct.pack("<Q", 2**60), "damaged in its header"),
        (16, struct.pack("<Q", 2**60), "damaged in its header"),
        (24, struct.pack("<Q", 2**63), "damaged in its header"),
    ],
)
def test_a_damaged_header_is_named(
    converted: Callable[..., Path], tmp_path: Path, at: int, content: bytes, words: str
) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        load_spec(edited(converted("llama"), tmp_path / "bad.gguf", at, content))
    assert "bad.gguf" in str(refusal.value)


def test_a_cut_file_is_refused_wherever_it_was_cut(converted: Callable[..., Path], tmp_path: Path) -> None:
    data = converted("llama").read_bytes()
    for length in (0, 3, 23, 24, 100, 1000, 5000, 9000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(ModelError, match="download it again"):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.architecture": ("falcon", None)}, ["falcon", "supported are llama, qwen2"]),
        ({"llama.expert_count": (8, None)}, ["expert_count=8"]),
        ({"llama.rope.scaling.type": ("longrope2", None), "llama.rope.scaling.factor": (2.0, None)}, ["longrope2"]),
        ({"llama.rope.dimension_count": (8, None)}, ["rope.dimension_count=8"]),
        ({"llama.attention.value_length": (8, None)}, ["value_length=8"]),
        ({"llama.attention.head_count": (3, None)}, ["num_attention_heads=3", "model.gguf"]),
        ({"llama.attention.layer_norm_rms_epsilon": (None, None)}, ["layer_norm_rms_epsilon"]),
        ({"llama.embedding_length": ("wide", None)}, ["hidden_size='wide'", "model.gguf"]),
        ({"tokenizer.ggml.eos_token_id": (9999, None)}, ["eos_token_id=9999"]),
        ({"split.count": (3, None), "split.no": (0, None)}, ["3 parts", "llama-gguf-split --merge"]),
    ],
)
def test_metadata_that_cannot_be_run_are_named(
    tiny_model: TinyModel, tmp_path: Path, metadata: dict[str, Any], words: list[str]
) -> None:
    given = {key: (None, None) if value is None else gguf_files.number(value) for key, (value, _) in metadata.items()}
    file = gguf_files.convert(tiny_model("llama"), tmp_path, metadata=given)
    with pytest.raises(ModelError) as refusal:
        load_spec(file)
    for word in [*words, str(file)]:
        assert word in str(refusal.value)


def test_an_unknown_tensor_type_is_named(converted: Callable[..., Path], tmp_path: Path) -> None:
    data = converted("llama").read_bytes()
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16
    for number, word in ((16, "IQ2_XXS"), (99, "of type 99")):
        with pytest.raises(ModelError, match=f"blk.0.attn_q.weight is {word}; supported are F32"):
            read_gguf(edited(converted("llama"), tmp_path / "bad.gguf", at, struct.pack("<I", number)))


def test_whatever_is_damaged_is_refused_or_read(converted: Callable[..., Path], tmp_path: Path) -> None:
    file, refused = converted("llama-llama3"), 0
    data = file.read_bytes()
    metadata = data.index(b"tokenizer.ggml.tokens")
    table = data.index(b"blk.0.")
    random = Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        begin, end = random.choice([(0, metadata), (table - 200, table + 800)])
        for _ in range(random.randint(1, 4)):
            damaged[random.randrange(begin, end)] = random.choice([0, 1, 8, 9, 255, random.randrange(256)])
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            load_spec(tmp_path / "damaged.gguf")
            Tokenizer.load(str(tmp_path / "damaged.gguf"))
        except ModelError:
            refused += 1
    assert 50 < refused < 300


def test_a_missing_tensor_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = gguf_files.convert(tiny_model("llama"), tmp_path, drop=("blk.1.ffn_up.weight",))
    with pytest.raises(ModelError, match="layers.1.mlp.up_proj.weight"):
        load_decoder(file)
