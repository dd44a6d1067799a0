"""The routes that manage adapters: vLLM's load and unload, and the registry of what jobs and imports left on disk.

What an adapter is made of is in `model/adapter.py`, where the registry is kept in `jobs/`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson
from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from tandem.api.finetuning_schemas import AdapterPath, Promotion, Rollback, adapter_object, alias_object, page
from tandem.api.schemas import LoadAdapterRequest, UnloadAdapterRequest
from tandem.api.serving import JsonRoute, Serving
from tandem.errors import Conflict, InvalidRequest, NotFound, TandemError
from tandem.jobs.records import AdapterRecord

if TYPE_CHECKING:
    from tandem.jobs.service import Jobs

# What PEFT reads. A checkpoint's directory also has what only its job needs to go on.
WEIGHTS, REQUIRED, OPTIONAL = "adapter_model.safetensors", "adapter_config.json", "README.md"
PIECE_BYTES = 2**18


def router(serving: Serving) -> APIRouter:
    """The registry's routes only where there are jobs."""
    routes = APIRouter(route_class=JsonRoute, tags=["Adapters"])
    _add_loading(routes, serving)
    if serving.jobs is not None:
        _add_registry(routes, serving, serving.jobs)
        _add_aliases(routes, serving.jobs)
        _add_export(routes, serving, serving.jobs)
    return routes


def _json(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


# ---------------------------------------------------------------- in the engine


def _add_loading(routes: APIRouter, serving: Serving) -> None:
    @routes.post("/v1/load_lora_adapter", response_model=None)
    async def load_lora_adapter(body: LoadAdapterRequest) -> Response:
        """Publish a PEFT directory as a model, until it is unloaded or the server ends."""
        name = body.lora_name
        if serving.is_base(name):
            raise Conflict(f"'{name}' is the base model's name: choose another", "lora_name")
        async with serving.adapter_lock(name):
            if await serving.record(name) is not None:
                raise Conflict(f"'{name}' is a name of the registry (GET /v1/adapters): choose another", "lora_name")
            if name in serving.engine.adapters and not body.load_inplace:
                raise Conflict(
                    f"the adapter '{name}' is loaded already: unload it first, or send load_inplace=true", "lora_name"
                )
            path = allowed_path(body.lora_path, serving.lora_root, "lora_path")
            await serving.engine.load_adapter(name, str(path))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", response_model=None)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> Response:
        """Unpublish an adapter; requests that use it finish with it. One of the registry is loaded again when asked."""
        name = body.lora_name
        async with serving.adapter_lock(name):
            if name not in serving.engine.adapters:
                raise NotFound(f"There is no adapter '{name}'. GET /v1/models lists those loaded.", "lora_name")
            await serving.engine.unload_adapter(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def allowed_path(path: str, root: Path | None, param: str) -> Path:
    """`path` with links followed; inside `root` where there is one. Says nothing of what exists outside."""
    try:
        resolved = Path(os.path.realpath((root or Path.cwd()) / path))
        inside = root is None or resolved.is_relative_to(os.path.realpath(root))
        if inside and not resolved.is_dir():
            raise InvalidRequest(f"there is no adapter directory {path}", param)
    except (OSError, ValueError) as e:
        if isinstance(e, InvalidRequest):
            raise
        raise InvalidRequest(f"{param} is not a usable path: {e}", param) from e
    if not inside:
        raise InvalidRequest(f"{param} lies outside of the directory given with --lora-root", param)
    return resolved


# ---------------------------------------------------------------- the registry


def _add_registry(routes: APIRouter, serving: Serving, jobs: Jobs) -> None:
    @routes.get("/v1/adapters", response_model=None)
    async def list_adapters() -> Response:
        """The adapters on disk, and the names that stand for them."""
        records, aliases = await jobs.adapters(), await jobs.aliases()
        pointing: dict[str, list[str]] = {}
        for alias in aliases:
            pointing.setdefault(alias.target, []).append(alias.name)
        resident = serving.engine.adapters
        shown = [adapter_object(record, record.name in resident, pointing.get(record.name, [])) for record in records]
        return _json({**page(shown, False), "aliases": [alias_object(alias) for alias in aliases]})

    @routes.post("/v1/adapters", response_model=None)
    async def import_adapter(body: AdapterPath) -> Response:
        """Copy a PEFT directory of the server's machine into the registry."""
        async with serving.adapter_lock(body.name):
            path = await asyncio.to_thread(allowed_path, body.path, serving.lora_root, "path")
            record = await jobs.import_adapter(body.name, str(path))
        return _json(adapter_object(record, record.name in serving.engine.adapters, []))

    @routes.delete("/v1/adapters/{name:path}", response_model=None)
    async def delete_adapter(name: str) -> Response:
        """Delete an adapter from disk, or an alias; requests that use it finish with it."""
        async with serving.adapter_lock(name):
            await jobs.delete_adapter(name)
        return _json({"id": name, "object": "adapter", "deleted": True})


def _add_aliases(routes: APIRouter, jobs: Jobs) -> None:
    @routes.post("/v1/adapters/promote", response_model=None)
    async def promote(body: Promotion) -> Response:
        """Let an alias stand for an adapter from the next request on."""
        return _json(alias_object(await jobs.promote(body.alias, body.target)))

    @routes.post("/v1/adapters/rollback", response_model=None)
    async def rollback(body: Rollback) -> Response:
        """Let an alias stand for what it stood for before."""
        return _json(alias_object(await jobs.rollback(body.alias)))


# ---------------------------------------------------------------- export


def _add_export(routes: APIRouter, serving: Serving, jobs: Jobs) -> None:
    @routes.post("/v1/adapters/export", response_model=None)
    async def export(body: AdapterPath) -> Response:
        """Copy an adapter as a PEFT directory to a new place on the server's machine."""
        record = await jobs.adapter(body.name)
        target = await asyncio.to_thread(_copied, record, body.path, serving.exports, serving.lora_root)
        return _json({"object": "adapter.export", "name": record.name, "path": str(target)})

    @routes.get("/v1/adapters/{name:path}/content", response_model=None)
    async def adapter_content(name: str) -> Response:
        """The adapter's PEFT directory as a tar file."""
        record = await jobs.adapter(name)
        files = await asyncio.to_thread(_opened, record)
        length = sum(512 + _padded(size) for _, size, _ in files) + 1024
        headers = {"content-length": str(length), "content-disposition": 'attachment; filename="adapter.tar"'}
        return StreamingResponse(_tar(files), media_type="application/x-tar", headers=headers)


def _peft_files(record: AdapterRecord) -> list[Path]:
    folder = Path(record.path)
    if not (folder / REQUIRED).is_file() or not (folder / WEIGHTS).is_file():
        raise NotFound(f"the files of the adapter '{record.name}' are gone from {folder}", "name")
    return [folder / name for name in (REQUIRED, WEIGHTS, OPTIONAL) if (folder / name).is_file()]


def _copied(record: AdapterRecord, path: str, exports: Path, lora_root: Path | None) -> Path:
    """A new directory at `path`, there as a whole or not at all. Relative paths start in the first root."""
    roots = [root for root in (lora_root, exports) if root is not None]
    target = Path(os.path.realpath(roots[0] / path))
    homes = [Path(os.path.realpath(root)) for root in roots]
    if not any(home in target.parents for home in homes):
        raise InvalidRequest(f"path must lie inside of {' or '.join(map(str, homes))}", "path")
    sources = _peft_files(record)
    try:
        if target.exists():
            raise Conflict(f"{target} exists already: choose another path", "path")
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
        try:
            for source in sources:
                shutil.copyfile(source, folder / source.name)
            folder.chmod(0o755)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and target.exists():  # another export was faster
            raise Conflict(f"{target} exists already: choose another path", "path") from error
        kind = TandemError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else InvalidRequest
        raise kind(f"cannot write {target}: {error.strerror}", "path") from error
    return target


def _opened(record: AdapterRecord) -> list[tuple[str, int, BinaryIO]]:
    """Name, size and file of each part: open from the start, so that a deletion cannot cut a download short."""
    files: list[tuple[str, int, BinaryIO]] = []
    try:
        for path in _peft_files(record):
            opened = path.open("rb")
            files.append((path.name, os.fstat(opened.fileno()).st_size, opened))
    except OSError as error:
        for _, _, stream in files:
            stream.close()
        raise TandemError(f"cannot read the adapter '{record.name}': {error}") from error
    return files


def _tar(files: list[tuple[str, int, BinaryIO]]) -> Iterator[bytes]:
    try:
        for name, size, stream in files:
            header = tarfile.TarInfo(name)
            header.size, header.mode = size, 0o644
            yield header.tobuf(tarfile.USTAR_FORMAT)
            while piece := stream.read(PIECE_BYTES):
                yield piece
            yield bytes(_padded(size) - size)
        yield bytes(1024)
    finally:
        for _, _, stream in files:
            stream.close()


def _padded(size: int) -> int:
    return -(-size // 512) * 512
