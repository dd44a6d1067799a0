"""Flags, environment, file and defaults become config dataclasses: precedence, conversion, refusals."""

import pytest

from tandem import config
from tandem.config import AdapterConfig, EngineConfig, ModelConfig, SchedulerConfig, ServerConfig
from tandem.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for option in config.options_of(EngineConfig, ServerConfig).values():
        monkeypatch.delenv(option.variable, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def write(tmp_path, text):
    path = tmp_path / "tandem.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_the_dataclasses_own():
    assert config.resolve((EngineConfig, ServerConfig), {}) == [EngineConfig(), ServerConfig()]


def test_each_source_beats_the_ones_after_it(tmp_path, monkeypatch):
    path = write(tmp_path, "port: 1\nhost: file\nmax-num-seqs: 5\n")
    monkeypatch.setenv("TANDEM_PORT", "2")
    monkeypatch.setenv("TANDEM_HOST", "variable")
    server, scheduler = config.resolve((ServerConfig, SchedulerConfig), {"port": "3"}, path)
    assert (server.port, server.host, scheduler.max_num_seqs) == (3, "variable", 5)
    assert scheduler.max_num_batched_tokens == SchedulerConfig().max_num_batched_tokens


def test_omp_num_threads_counts_after_everything_but_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert config.resolve((ModelConfig,), {})[0].num_threads == 3
    path = write(tmp_path, "num_threads: 4")
    assert config.resolve((ModelConfig,), {}, path)[0].num_threads == 4
    monkeypatch.setenv("TANDEM_NUM_THREADS", "5")
    assert config.resolve((ModelConfig,), {}, path)[0].num_threads == 5


def test_nested_configs_are_filled_by_flat_names():
    (engine,) = config.resolve((EngineConfig,), {"model": "x", "num_blocks": "7", "max_loras": 2})
    assert (engine.model.model, engine.cache.num_blocks, engine.adapters.max_loras) == ("x", 7, 2)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a=1,b=2", ["a=1", "b=2"]), (["a=1", "b=2"], ["a=1", "b=2"]), ('["a=1", "b=2"]', ["a=1", "b=2"]), ("", [])],
)
def test_lists_from_commas_words_and_json(value, expected):
    assert config.resolve((AdapterConfig,), {"lora_modules": value})[0].lora_modules == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("2g", 2 * 10**9), ("2G", 2**31), ("1.5K", 1536), ("16", 16), ("8k", 8000)]
)
def test_whole_numbers_take_vllms_suffixes(text, expected):
    (engine,) = config.resolve((EngineConfig,), {"kv_cache_memory_bytes": text})
    assert engine.cache.kv_cache_memory_bytes == expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("port", "x", "--port must be a whole number"),
        ("port", "1.5", "--port must be a whole number"),
        ("port", "-1", "--port must be at least 0"),
        ("port", "65536", "--port must be at most 65535"),
        ("seed", "9223372036854775808", "--seed must be at most 9223372036854775807"),
        ("seed", "-9223372036854775809", "--seed must be at least -9223372036854775808"),
        ("max_num_seqs", "10000000000g", "--max-num-seqs must be at most"),
        ("gpu_memory_utilization", "nan", "at least 0"),
        ("gpu_memory_utilization", "1.5", "at most 1"),
        ("model", "caf\udce9", "--model must be valid UTF-8 without NUL, not 'caf"),
        ("lora_modules", ["a=\udcff"], "--lora-modules must be valid UTF-8"),
        ("tokenizer", "a\0b", "without NUL"),
        ("num_blocks", "0", "at least 1"),
        ("num_blocks", "1.2345k", "whole number"),
        ("max_wait_s", "nan", "at least 0"),
        ("dtype", "int3", "must be one of auto, float32, bfloat16"),
        ("enable_prefix_caching", "perhaps", "true or false"),
        ("allowed_origins", "[oops", "JSON"),
        ("host", ["a", "b"], "single value"),
        ("lora_modules", 3, "must be a list"),
    ],
)
def test_bad_values_are_refused_by_name(name, value, words):
    with pytest.raises(ConfigError, match=words):
        config.resolve((EngineConfig, ServerConfig), {name: value})


def test_a_bad_variable_is_named(monkeypatch):
    monkeypatch.setenv("TANDEM_MAX_NUM_SEQS", "many")
    with pytest.raises(ConfigError, match="TANDEM_MAX_NUM_SEQS must be a whole number"):
        config.resolve((SchedulerConfig,), {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 80", "unknown option 'prot', did you mean 'port'"),
        ("- port", "option: value"),
        ("port: [", "cannot read"),
        ("port: {a: 1}", "single value"),
        ("port: x", "tandem.yaml: port must be a whole number"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        config.resolve((ServerConfig,), {}, write(tmp_path, text))


def test_a_missing_file_and_an_empty_one(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the config file"):
        config.resolve((ServerConfig,), {}, str(tmp_path / "none.yaml"))
    assert config.resolve((ServerConfig,), {}, write(tmp_path, "")) == [ServerConfig()]


def test_booleans_from_yaml_and_text(tmp_path, monkeypatch):
    path = write(tmp_path, "vllm-metrics: no\ndisable_log_stats: true")
    (server,) = config.resolve((ServerConfig,), {}, path)
    assert (server.vllm_metrics, server.disable_log_stats) == (False, True)
    monkeypatch.setenv("TANDEM_VLLM_METRICS", "1")
    assert config.resolve((ServerConfig,), {}, path)[0].vllm_metrics is True
