"""A model's name becomes one directory, by the same rule for its weights and its tokenizer."""

import subprocess
import sys

import huggingface_hub
import pytest

from tandem.errors import ModelError
from tandem.hub import MODEL_FILES, TOKENIZER_FILES, resolve_model
from tandem.tokenizer import Tokenizer


@pytest.fixture
def tokenizer_dir(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Backend(models.BPE({char: i for i, char in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_paths_and_what_is_no_path(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match="not a directory"):
        resolve_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="neither a directory nor a hub id"):
        resolve_model("what is this?")
    with pytest.raises(ModelError, match="give the path of a downloaded model"):
        resolve_model("nobody/nothing-that-exists")  # the tests run with the hub switched off
    with pytest.raises(ModelError, match="~nobody-of-that-name"):
        resolve_model("~nobody-of-that-name/model")


def test_the_home_directory_holds_for_model_and_tokenizer(tokenizer_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(tokenizer_dir.parent))
    assert resolve_model("~/model") == tokenizer_dir
    assert len(Tokenizer.load("~/model")) == 256


def test_a_hub_id_is_fetched_once_at_its_revision_and_loaded_from_there(tokenizer_dir, monkeypatch):
    asked = []

    def snapshot(repo, revision, allow_patterns):
        asked.append((repo, revision, tuple(allow_patterns)))
        return str(tokenizer_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("org/name", "v1") == tokenizer_dir
    assert Tokenizer.load("org/name", revision="v1").encode("a")
    assert asked == [("org/name", "v1", MODEL_FILES), ("org/name", "v1", TOKENIZER_FILES)]
    assert "*.safetensors" not in TOKENIZER_FILES


def test_looking_for_a_model_needs_no_torch():
    code = (
        "import sys, tandem.hub as h\ntry: h.resolve_model('no one')\nexcept h.ModelError: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository with GGUF files on a hub that gives what is asked for; the patterns asked for."""
    where, asked = tmp_path / "snapshot", []
    for name in ("m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m-q8_0.gguf", "UD/m-UD-Q8_0.gguf", "m-F16-00001-of-00002.gguf"):
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(b"GGUF")

    def snapshot(repo, revision, allow_patterns):
        asked.append((repo, revision, tuple(allow_patterns)))
        return str(where)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return where, asked


def test_a_gguf_file_is_a_model(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("m.gguf").name == "m.gguf"
    for name in ("./none.gguf", "/a/b/none.gguf", "~/none.gguf"):
        with pytest.raises(ModelError, match="not a directory or GGUF file"):
            resolve_model(name)
    (tmp_path / "m.txt").write_text("")
    with pytest.raises(ModelError, match="not a directory or GGUF file"):
        resolve_model("m.txt")


def test_a_folder_of_gguf_files_says_which(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"give one of its GGUF files: a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_tag_names_one_file_of_the_hub(hub):
    where, asked = hub
    assert resolve_model("org/repo:Q4_K_M", "v1") == where / "m-Q4_K_M.gguf"
    assert resolve_model("org/repo:q4_k_s") == where / "m-Q4_K_S.gguf"
    assert asked[0] == ("org/repo", "v1", ("*Q4_K_M*.gguf", "*q4_k_m*.gguf"))
    with pytest.raises(ModelError, match=r"could be any of UD/m-UD-Q8_0\.gguf, m-q8_0\.gguf: give org/repo/FILE"):
        resolve_model("org/repo:Q8_0")
    for tag in ("Q4", "Q4_K", "Q6_K"):
        with pytest.raises(ModelError, match=f"no GGUF file named after {tag}"):
            resolve_model(f"org/repo:{tag}")


def test_a_file_of_the_hub_is_fetched_alone(hub):
    where, asked = hub
    assert resolve_model("org/repo/UD/m-UD-Q8_0.gguf") == where / "UD/m-UD-Q8_0.gguf"
    assert asked == [("org/repo", None, ("UD/m-UD-Q8_0.gguf",))]
    with pytest.raises(ModelError, match="has no file other.gguf"):
        resolve_model("org/repo/other.gguf")
