"""Every option of the engine and the server as frozen dataclasses; those of a client verb stand beside the verb. The
command line is generated from the fields (`cli/options.py`), and this is the only file that reads the environment.
Nobody changes a config after it is built; parts are given the narrow one they need, functions are given values.

Names are vLLM's wherever the meaning is the same. Precedence: flag, `TANDEM_<FLAG>`, `--config FILE`, default.
The second half of the file turns flags, environment and file into these dataclasses; it knows no command.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError

# Where the model called "demo" lives.
DEMO_MODEL = Path(__file__).resolve().parent / "assets" / "demo"


def option(default, help: str, **extra):  # noqa: ANN001, ANN201
    """A dataclass field with its help text.

    `extra` may hold `choices`, `metavar`, `low` and `high` (the smallest and the largest number accepted; whole ones
    fit 64 bits anyway) and `env` (another variable's name that is honoured after `TANDEM_<FLAG>` and the file).
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help, **extra})
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class ModelConfig:
    """Which weights, on what."""

    model: str = option(
        "demo", "Hugging Face directory, GGUF file, hub id or ORG/REPO:Q4_K_M; 'demo' is the embedded model"
    )
    tokenizer: str | None = option(None, "tokenizer directory, GGUF file or hub id, if not the model's own")
    revision: str | None = option(None, "hub revision (branch, tag or commit)")
    dtype: str = option("auto", "weights and activations", choices=("auto", "float32", "bfloat16"))
    quantization: str = option(
        "none", "store linear layers in fewer bits, computed while loading (CPU only)", choices=("none", "int8", "int4")
    )
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    max_model_len: int | None = option(
        None, "longest context in tokens (default: the model's own, or what memory allows)", low=1
    )
    num_threads: int | None = option(
        None, "CPU threads of the engine (default: all cores)", low=1, env="OMP_NUM_THREADS"
    )
    cpu_isa: str = option(
        "auto", "instruction set of the CPU kernels", choices=("auto", "amx", "avx512", "avx2", "torch")
    )
    autotune: str = option(
        "auto", "start-up calibration: auto keeps it in the user's cache directory, again measures afresh, off keeps "
        "nothing, measures at every start and uses all cores", choices=("auto", "again", "off"),
    )  # fmt: skip
    seed: int = option(0, "seeds the random numbers of requests that bring no seed")


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache."""

    block_size: int = option(16, "tokens in one KV block", low=1)
    kv_cache_memory_bytes: int | None = option(
        None, "bytes for the KV cache (default: a share of the free memory)", low=1
    )
    num_blocks: int | None = option(None, "number of KV blocks, instead of a size in bytes", low=1)
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory the engine may fill", low=0.0, high=1.0)
    kv_cache_dtype: str = option(
        "auto", "numbers in the KV cache; auto: as the weights. int8 or int4 take 1.7 or 3 times fewer bytes, and "
        "training tokens then do not ride in forward passes of serving", choices=("auto", "int8", "int4"),
    )  # fmt: skip
    enable_prefix_caching: bool = option(True, "keep and share the KV blocks of common prefixes")


@dataclass(frozen=True)
class SchedulerConfig:
    """How much goes into one step."""

    max_num_seqs: int = option(64, "sequences running at once", low=1)
    max_num_batched_tokens: int = option(512, "tokens in one step at most", low=1)
    max_num_queued_reqs: int = option(1024, "waiting requests before new ones get 429", low=0)
    max_wait_s: float = option(120.0, "predicted wait in seconds from which new requests get 429", low=0.0)


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA adapters."""

    lora_modules: list[str] = option([], "adapters to load at start, as name=path", metavar="NAME=PATH")
    max_loras: int = option(32, "different adapters in one batch", low=1)
    max_lora_rank: int = option(256, "largest rank accepted", low=1)
    max_cpu_loras: int = option(256, "adapters resident at once", low=1)
    lora_root: str | None = option(None, "directory outside of which /v1/load_lora_adapter may not read")


@dataclass(frozen=True)
class TrainingConfig:
    """Fine-tuning beside serving."""

    slo_tpot_ms: float | None = option(
        None, "time per output token training must not break, in ms (default: twice one stream's, at least 20)", low=0.0
    )
    slo_ttft_ms: float = option(3000.0, "time to first token that training must not break, in ms", low=0.0)
    train_step_ms: float = option(150.0, "longest that training keeps an arriving request waiting, in ms", low=1.0)
    train_memory_bytes: int | None = option(
        None, "bytes for what training keeps between forward and backward (default: a share of the free memory)", low=1
    )
    train_batch_tokens: int = option(512, "tokens of training sequences that go through the layers together", low=1)
    train_window: int | None = option(
        None, "tokens of one training slice at most (default: what the time allows, up to 512)", low=1
    )
    train_resident_bytes: int | None = option(
        None, "bytes for the weights, gradients and optimizer state of open training runs; those used least recently "
        "are kept on disk beyond it (default: a share of the free memory)", low=1,
    )  # fmt: skip
    max_resident_runs: int | None = option(None, "open training runs in memory at once, in any case", low=1)
    train_spill_dir: str | None = option(
        None, "directory for the state of training runs that is not in memory (default: below the state directory of a "
        "server, else a temporary one); empty again at the end",
    )  # fmt: skip
    share_prefixes: bool = option(
        True, "examples of a pass that begin with the same tokens go through the layers once up to where they part"
    )
    share_forward: bool = option(True, "training tokens ride in the forward passes of serving")
    deterministic: bool = option(
        False, "train in fixed pieces apart from serving, so that the same job gives the same bits; slower"
    )


@dataclass(frozen=True)
class EngineConfig:
    """All the engine process needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class JobsConfig:
    """Fine-tuning jobs, and what must survive a restart."""

    state_dir: str = option("~/.tandem", "directory of uploaded files, checkpoints and adapters")
    database_url: str | None = option(
        None, "SQLAlchemy URL of the database, postgresql://... say (default: SQLite in the state directory)"
    )
    organization: str = option("tandem", "the organization in the names of fine-tuned models")
    max_running_jobs: int = option(4, "jobs training at once; the others wait", low=1)
    max_file_bytes: int = option(512 * 2**20, "largest uploaded file accepted, in bytes", low=1)
    grader_hosts: list[str] = option(
        [], "hosts that graders of type endpoint may ask, as name or name:port (default: none)", metavar="HOST"
    )


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on (0: any free one)", low=0, high=65535)
    api_key: str | None = option(None, "clients must send this key (default: any key is accepted)")
    served_model_name: list[str] = option([], "names of the base model in the API (default: the model as given)")
    chat_template: str | None = option(None, "file with a Jinja chat template, or the template itself")
    trust_request_chat_template: bool = option(False, "let requests bring a chat_template of their own")
    root_path: str = option("", "path prefix when behind a proxy")
    allowed_origins: list[str] = option([], "origins allowed by CORS")
    max_body_bytes: int = option(32 * 2**20, "largest request body accepted, in bytes", low=1)
    vllm_metrics: bool = option(True, "also expose the vllm:* metric names")
    uvicorn_log_level: str = option(
        "warning", "log level of the HTTP server", choices=("critical", "error", "warning", "info", "debug", "trace")
    )
    disable_log_stats: bool = option(False, "no periodic line with throughput and cache use")


def cache_dir() -> Path:
    """Where files go that can be made again: `tandem` in the user's cache directory (XDG_CACHE_HOME, or ~/.cache)."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "tandem"


# From text to fields. A flag, a variable and a file entry go through the same conversion and the same checks.


@dataclass(frozen=True)
class Option:
    """One dataclass field as the outside sees it: `kind` is str, int, float or bool; `is_list` says several of them."""

    name: str
    kind: type
    is_list: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    metavar: str | None
    env: str | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return "TANDEM_" + self.name.upper()


def options_of(*classes: type) -> dict[str, Option]:
    """The options of config classes by name, nested configs flattened. A name twice is a programmer's mistake."""
    found: dict[str, Option] = {}
    for cls in classes:
        kinds = typing.get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            if dataclasses.is_dataclass(kinds[entry.name]):
                nested = options_of(kinds[entry.name])
            else:
                nested = {entry.name: _option(entry, kinds[entry.name])}
            assert not found.keys() & nested.keys(), f"option names clash: {found.keys() & nested.keys()}"
            found |= nested
    return found


def _option(entry: dataclasses.Field, kind: Any) -> Option:
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    is_list = typing.get_origin(kind) is list
    if is_list:
        (kind,) = typing.get_args(kind)
    default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    more = entry.metadata
    # What travels between the processes are 64-bit integers.
    low, high = (-(2**63), 2**63 - 1) if kind is int else (None, None)
    return Option(
        entry.name, kind, is_list, default, more.get("help", ""), tuple(more.get("choices", ())),
        more.get("low", low), more.get("high", high), more.get("metavar"), more.get("env"),
    )  # fmt: skip


def convert(option: Option, value: Any, source: str) -> Any:
    """`value` (text, or what YAML made of it) as the option's kind. ConfigError names `source`."""
    if not option.is_list:
        return _scalar(option, value, source)
    if isinstance(value, str):
        parts = [value] if value.startswith("[") else value.split(",")
        value = [part.strip() for part in parts if part.strip()]
    if not isinstance(value, list):
        raise ConfigError(f"{source} must be a list, not {value!r}")
    if len(value) == 1 and str(value[0]).startswith("["):
        value = _json_list(value[0], source)
    return [_scalar(option, item, source) for item in value]


def _json_list(text: str, source: str) -> list[Any]:
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{source} starts like a JSON list but is none: {text!r}") from None


_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_TRUTHS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _scalar(option: Option, value: Any, source: str) -> Any:
    if isinstance(value, (list, dict)):
        raise ConfigError(f"{source} must be a single value, not {value!r}")
    text = str(value).strip()
    try:
        if option.kind is bool:
            value = _TRUTHS[text.lower()]
        elif option.kind is int:
            scale = _SUFFIXES.get(text[-1:], 1)
            number = float(text[:-1]) * scale if scale > 1 else int(text)
            value = int(number)
            if value != number:
                raise ValueError
        else:
            value = option.kind(text)
    except (ValueError, KeyError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number (k, m, g: thousands; K, M, G: 1024s)", float: "a number"}
        raise ConfigError(f"{source} must be {wanted[option.kind]}, not {text!r}") from None
    if option.choices and value not in option.choices:
        raise ConfigError(f"{source} must be one of {', '.join(option.choices)}, not {text!r}")
    if option.low is not None and not value >= option.low:
        raise ConfigError(f"{source} must be at least {option.low}, not {text!r}")
    if option.high is not None and not value <= option.high:
        raise ConfigError(f"{source} must be at most {option.high}, not {text!r}")
    if isinstance(value, str) and not _is_text(value):
        raise ConfigError(f"{source} must be valid UTF-8 without NUL, not {text!r}")
    return value


def _is_text(value: str) -> bool:
    """Bytes of a command line that are not UTF-8 arrive as lone surrogates, which no message can carry."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def config_file(path: str, known: Iterable[str]) -> dict[str, Any]:
    """The entries of a YAML file by option name. ConfigError for an unreadable file or a key not in `known`."""
    known, named = list(known), {}
    for key, value in read_yaml(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"{path}: unknown option '{key}'" + (f", did you mean '{near[0]}'?" if near else ""))
        named[name] = value
    return named


def read_yaml(path: str) -> dict[Any, Any]:
    """The entries of a YAML file as it spells them. ConfigError where it cannot be read or holds something else."""
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            entries = yaml.safe_load(stream) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"{path} must hold `option: value` lines, not a {type(entries).__name__}")
    return entries


def resolve(
    classes: tuple[type, ...],
    flags: Mapping[str, Any],
    path: str | None = None,
    entries: Mapping[str, Any] | None = None,
) -> list[Any]:
    """One instance per class from `flags` (option name -> text or value), the environment, the file at `path` and
    the defaults, in that order. `entries`: the file's by option name, where it has been read already.
    ConfigError names where a bad value came from."""
    known = options_of(*classes)
    if entries is None:
        entries = config_file(path, known) if path else {}
    values = {}
    for name, opt in known.items():
        if name in flags:
            values[name] = convert(opt, flags[name], opt.flag)
        elif os.environ.get(opt.variable):
            values[name] = convert(opt, os.environ[opt.variable], opt.variable)
        elif entries.get(name) is not None:
            values[name] = convert(opt, entries[name], f"{path}: {name}")
        elif opt.env and os.environ.get(opt.env):
            values[name] = convert(opt, os.environ[opt.env].split(",")[0], opt.env)
    return [_instance(cls, values) for cls in classes]


def _instance(cls: type, values: Mapping[str, Any]) -> Any:
    kinds = typing.get_type_hints(cls)
    given = {}
    for entry in dataclasses.fields(cls):
        if dataclasses.is_dataclass(kinds[entry.name]):
            given[entry.name] = _instance(typing.cast(type, kinds[entry.name]), values)
        elif entry.name in values:
            given[entry.name] = values[entry.name]
    return cls(**given)
