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
