"""Names of models -> directories or GGUF files on this machine: a path, or a Hugging Face hub id, looked up in the
local cache or downloaded. One rule for weights and tokenizers. Not here: what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tandem.errors import ModelError

TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt")
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
GGUF = ".gguf"
# org/repo:Q4_K_M, as llama.cpp and Ollama write it, and org/repo/folder/file.gguf.
_TAGGED = re.compile(r"([\w.-]+/[\w.-]+):([\w.-]+)")
_FILE = re.compile(r"([\w.-]+/[\w.-]+)/([\w./ -]+\.gguf)", re.IGNORECASE)
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def resolve_model(name_or_path: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES) -> Path:
    """The directory or GGUF file of a model: a path (`~` is the home), or a hub id, of which only `files` at `revision`
    are fetched; `org/repo:TAG` and `org/repo/file.gguf` fetch that one GGUF file.

    Raises ModelError where there is no such directory or file and the hub does not give it.
    """
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:  # ~somebody who does not exist
        raise ModelError(f"{name_or_path} is not a directory: {error}") from None
    if path.is_dir():
        return _directory(path)
    if is_gguf(path) and path.is_file():
        return path
    is_path = name_or_path.startswith((".", "/", "~")) or path.exists()
    if not is_path and (wanted := _FILE.fullmatch(name_or_path)):
        return _only(name_or_path, _fetched(wanted[1], revision, [wanted[2]]), wanted[2])
    if not is_path and (wanted := _TAGGED.fullmatch(name_or_path)):
        tag = wanted[2].removesuffix(GGUF)
        # Hub patterns know upper from lower case, and people write both.
        patterns = sorted({f"*{spelt}*.gguf" for spelt in (tag, tag.upper(), tag.lower())})
        return _tagged(name_or_path, _fetched(wanted[1], revision, patterns), tag)
    if is_path or name_or_path.count("/") > 1:
        raise ModelError(
            f"{name_or_path} is not a directory or GGUF file; give a Hugging Face model directory, a GGUF file or a "
            "hub id"
        )
    return _directory(_fetched(name_or_path, revision, files))


def is_gguf(path: Path) -> bool:
    """Whether this path names a GGUF file, by its suffix."""
    return path.suffix.lower() == GGUF


def _fetched(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is neither a directory nor a hub id: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{repo!r} is no directory here, and the hub did not give it ({reason}); "
            "check the name and the connection, or give the path of a downloaded model"
        ) from None


def _directory(path: Path) -> Path:
    """`path`, unless all it can be used for is a GGUF file in it."""
    if not (path / "config.json").is_file():
        found = [file for file in sorted(path.glob(f"*{GGUF}")) if not _PART.search(file.name)]
        if found and not any(path.glob("tokenizer*")):
            names = ", ".join(file.name for file in found)
            raise ModelError(f"{path} is no Hugging Face model directory; give one of its GGUF files: {names}")
    return path


def _only(name: str, where: Path, file: str) -> Path:
    if not (where / file).is_file():
        raise ModelError(f"{name}: the hub's repository has no file {file}, or it is not in the local cache")
    return where / file


def _tagged(name: str, where: Path, tag: str) -> Path:
    """The one file whose name has `tag` as a word of its own."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(tag)}(?![a-z0-9_])", re.IGNORECASE)
    found = sorted(file for file in where.rglob(f"*{GGUF}") if word.search(file.stem))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(f"{name}: the hub's repository has no GGUF file named after {tag}, or it is not in the cache")
    repo, names = name.partition(":")[0], ", ".join(str(file.relative_to(where)) for file in found)
    raise ModelError(f"{name} could be any of {names}: give {repo}/FILE")
