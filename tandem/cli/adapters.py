"""`tandem adapters ls|load|unload|export|merge|promote|rollback|rm`: a running server's adapters and their aliases.

The registry itself is the server's; merging is done here, by `model/export.py`, and needs no server for a directory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

from tandem.cli import client, options, startup
from tandem.cli.jobs import table, when
from tandem.config import DEMO_MODEL
from tandem.errors import ConfigError, TandemError
from tandem.hub import resolve_model

if TYPE_CHECKING:
    import httpx

CONFIG_FILE = "adapter_config.json"


def parser(prog: str) -> options.Parser:
    """The server, and what the verb `prog` ends with takes."""
    verb = prog.split()[-1]
    run, words, about = VERBS[verb]
    made = options.Parser(prog=prog, description=about)
    made.set_defaults(verb=run)
    for word in words.split():
        made.add_argument(word.lower(), metavar=word, help=WORDS[word])
    if verb == "ls":
        made.add_argument("--json", action="store_true", help="print what the server says as JSON")
    if verb == "merge":
        made.add_argument("--model", help="the base model's directory or hub id (default: the one the adapter names)")
        made.add_argument("--revision", help="hub revision of the base model (branch, tag or commit)")
        made.add_argument("--output", required=True, metavar="DIR", help="new directory for the merged model")
    options.add(made, client.Server)
    return made


def run(namespace: argparse.Namespace) -> int:
    """Do what the verb says."""
    (server,) = options.resolve(namespace, client.Server)
    with client.connect_to(server.server, server.api_key) as http:
        namespace.verb(http, namespace)
    return 0


def download(http: httpx.Client, name: str, directory: Path) -> None:
    """Write the server's adapter `name` to the new directory `directory`, whole or not at all.

    Raises ConfigError where it exists, TandemError where server or disk fail.
    """
    if directory.exists():
        raise ConfigError(f"{directory} exists already: choose another directory, or remove it first")
    partial = directory.absolute().with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        with tempfile.TemporaryFile(dir=partial) as archive:
            _receive(http, name, archive)
            archive.seek(0)
            with tarfile.open(fileobj=archive) as members:
                members.extractall(partial, filter="data")
        if not (partial / CONFIG_FILE).is_file():
            raise TandemError(f"the server sent no {CONFIG_FILE} for {name}")
        partial.rename(directory)
    except (OSError, tarfile.TarError) as error:
        raise TandemError(f"cannot write {directory}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _receive(http: httpx.Client, name: str, archive: BinaryIO) -> None:
    import httpx

    try:
        with http.stream("GET", _route(name) + "/content") as response:
            if response.status_code != 200:
                raise TandemError(client.failure(response.status_code, response.read()))
            for piece in response.iter_bytes():
                archive.write(piece)
    except httpx.ConnectError as error:
        raise client.unreachable(str(http.base_url).rstrip("/"), error) from error
    except httpx.TransportError as error:
        raise TandemError(f"the connection to the server broke: {error}") from error


def _route(name: str) -> str:
    return "adapters/" + quote(name, safe=":")


def _ls(http: httpx.Client, namespace: argparse.Namespace) -> None:
    reply = client.call(http, "GET", "adapters")
    aliases = reply.get("aliases", [])
    if namespace.json:
        print(json.dumps({"adapters": reply["data"], "aliases": aliases}, indent=2))
        return
    rows = [[a["name"], a["kind"], str(a["rank"]), when(a["created_at"]), "yes" if a["resident"] else "no",
             ", ".join(a["aliases"])] for a in reply["data"]]  # fmt: skip
    known = {a["name"] for a in reply["data"]} | {alias["name"] for alias in aliases}
    rows += [[card["id"], "loaded", "", "", "yes", ""] for card in _others(http, known)]
    if rows:
        print("\n".join(table(["ADAPTER", "KIND", "RANK", "CREATED", "RESIDENT", "ALIASES"], rows)))
    else:
        print("no adapters; import one with: tandem adapters load NAME PATH")


def _others(http: httpx.Client, known: set[str]) -> list[dict[str, Any]]:
    """Adapters that are only in the engine's memory, loaded with --lora-modules or by vLLM's route."""
    models = client.call(http, "GET", "models")["data"]
    return [card for card in models if card.get("parent") and card["id"] not in known]


def _load(http: httpx.Client, namespace: argparse.Namespace) -> None:
    # The server reads the path, and its working directory is not this one.
    body = {"name": namespace.name, "path": os.path.abspath(os.path.expanduser(namespace.path))}
    adapter = client.call(http, "POST", "adapters", json=body)
    print(f"{adapter['name']} is imported (rank {adapter['rank']}); use it as the model of a request or a job")


def _unload(http: httpx.Client, namespace: argparse.Namespace) -> None:
    client.call(http, "POST", "unload_lora_adapter", json={"lora_name": namespace.name})
    print(f"{namespace.name} is out of the engine's memory")


def _export(http: httpx.Client, namespace: argparse.Namespace) -> None:
    directory = Path(namespace.dir).expanduser()
    download(http, namespace.name, directory)
    print(f"{namespace.name} is in {directory}, a PEFT directory")


def _merge(http: httpx.Client, namespace: argparse.Namespace) -> None:
    output, adapter = Path(namespace.output).expanduser(), Path(namespace.name_or_dir).expanduser()
    if output.exists():
        raise ConfigError(f"--output {output} exists already: choose another directory, or remove it first")
    if adapter.is_dir():
        _merge_directory(adapter, namespace, output)
        return
    with tempfile.TemporaryDirectory(prefix="tandem-") as folder:
        adapter = Path(folder) / "adapter"
        download(http, namespace.name_or_dir, adapter)
        _merge_directory(adapter, namespace, output)


def _merge_directory(adapter: Path, namespace: argparse.Namespace, output: Path) -> None:
    from tandem.model.export import merge_adapter

    name = namespace.model or _base_of(adapter)
    base = DEMO_MODEL if name == "demo" else resolve_model(name, namespace.revision)
    with startup.loading_bar() as advance:
        merge_adapter(base, adapter, output, advance)
    print(f"{name} with {namespace.name_or_dir} is in {output}; serve it with: tandem serve {output}")


def _base_of(adapter: Path) -> str:
    try:
        name = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{adapter} is no PEFT adapter directory: {error}") from None
    if not name:
        raise options.UsageError(f"{adapter / CONFIG_FILE} does not name its base model: give --model")
    return str(name)


def _promote(http: httpx.Client, namespace: argparse.Namespace) -> None:
    body = {"alias": namespace.alias, "target": namespace.target}
    _print_alias(client.call(http, "POST", "adapters/promote", json=body))


def _rollback(http: httpx.Client, namespace: argparse.Namespace) -> None:
    _print_alias(client.call(http, "POST", "adapters/rollback", json={"alias": namespace.alias}))


def _print_alias(alias: dict[str, Any]) -> None:
    before = f"; before: {alias['history'][-1]}" if alias["history"] else ""
    print(f"{alias['name']} -> {alias['target']}{before}")


def _rm(http: httpx.Client, namespace: argparse.Namespace) -> None:
    client.call(http, "DELETE", _route(namespace.name))
    print(f"{namespace.name} is deleted")


WORDS = {
    "NAME": "the adapter's name",
    "PATH": "PEFT directory on the server's machine",
    "DIR": "new directory on this machine",
    "NAME_OR_DIR": "an adapter of the server, or a PEFT directory on this machine",
    "ALIAS": "the name that clients use, my-assistant say",
    "TARGET": "the adapter it shall stand for",
}
# Verb -> what it does, its positional arguments, its help.
VERBS: dict[str, tuple[Callable[[httpx.Client, argparse.Namespace], None], str, str]] = {
    "ls": (_ls, "", "List the adapters of a server and the aliases that stand for them."),
    "load": (_load, "NAME PATH", "Import a PEFT directory into a server: it is copied, and stays until adapters rm."),
    "unload": (_unload, "NAME", "Take an adapter out of the engine's memory; its files stay."),
    "export": (_export, "NAME DIR", "Fetch an adapter of a server as a PEFT directory."),
    "merge": (_merge, "NAME_OR_DIR", "Write base model + adapter as one model that needs no adapter support."),
    "promote": (_promote, "ALIAS TARGET", "Let an alias stand for an adapter from the next request on."),
    "rollback": (_rollback, "ALIAS", "Let an alias stand for what it stood for before."),
    "rm": (_rm, "NAME", "Delete an adapter from a server's disk."),
}
