"""Names of models -> directories on this machine: a path, or a Hugging Face hub id, looked up in the local cache or
downloaded. One rule for weights and tokenizers. Not here: what is in the directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tandem.errors import ModelError

TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt")
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)


def resolve_model(name_or_path: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES) -> Path:
    """The directory of a model: a path (`~` is the home), or a hub id, of which only `files` at `revision` are fetched.

    Raises ModelError where there is no such directory and the hub does not give it.
    """
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:  # ~somebody who does not exist
        raise ModelError(f"{name_or_path} is not a directory: {error}") from None
    if path.is_dir():
        return path
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or path.exists()
    if looks_like_path:
        raise ModelError(f"{name_or_path} is not a directory; give a Hugging Face model directory or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=list(files)))
    except HFValidationError as error:
        raise ModelError(f"{name_or_path!r} is neither a directory nor a hub id: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name_or_path!r} is no directory here, and the hub did not give it ({reason}); "
            "check the name and the connection, or give the path of a downloaded model"
        ) from None
