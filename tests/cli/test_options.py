"""Flags made from dataclasses: spelling, near misses, and vLLM's flags that are not ours."""

import pytest

from tandem.cli import options, serve, vllm_flags
from tandem.config import AdapterConfig, EngineConfig, ModelConfig, ServerConfig, options_of
from tandem.errors import ConfigError


def parse(*argv):
    """(namespace, notes) of a `tandem serve` line."""
    notes = []
    return serve.parser("tandem serve").parse(argv, notes.append), notes


def resolve(*argv):
    namespace, _ = parse(*argv)
    serve.one_model(namespace)
    return options.resolve(namespace, EngineConfig, ServerConfig)


def test_every_option_has_a_flag_and_help():
    known = serve.parser("x")._option_string_actions
    for option in options_of(EngineConfig, ServerConfig).values():
        assert option.flag in known and option.help, option.name


@pytest.mark.parametrize("spelling", ["--max-num-seqs", "--max_num_seqs"])
@pytest.mark.parametrize("joined", [True, False])
def test_underscores_count_as_dashes_in_names_only(spelling, joined):
    words = [f"{spelling}=9"] if joined else [spelling, "9"]
    engine, _ = resolve(*words, "--lora-modules", "a_b=c_d")
    assert engine.scheduler.max_num_seqs == 9
    assert engine.adapters.lora_modules == ["a_b=c_d"]


@pytest.mark.parametrize("argv", [["m"], ["--model", "m"], ["m", "--model", "m"]])
def test_the_model_three_ways(argv):
    assert resolve(*argv)[0].model.model == "m"
    assert resolve("--demo")[0].model.model == resolve()[0].model.model == "demo"


def test_the_model_twice_is_refused():
    with pytest.raises(options.UsageError, match="one model at a time, not demo and m"):
        resolve("m", "--demo")


def test_lists_and_booleans():
    engine, server = resolve("--lora-modules", "a=1", "b=2", "--lora-modules", "c=3", "--no-vllm-metrics")
    assert engine.adapters.lora_modules == ["a=1", "b=2", "c=3"]
    assert server.vllm_metrics is False and ServerConfig().vllm_metrics is True
    assert resolve("--disable-log-stats")[1].disable_log_stats is True


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lora-modules", "demo=/x"], "--lora-modules demo: that is the base model's name"),
        (["org/m", "--lora-modules", "a=1", "org/m=/x"], "--lora-modules org/m: that is the base model's name"),
        (["--served-model-name", "one", "two", "--lora-modules", "two=/x"], "--lora-modules two: that is the base"),
        (["--lora-modules", "a=1", "b=2", "a=3"], "--lora-modules names a twice"),
        (["--served-model-name", "one", "two", "one"], "--served-model-name names one twice"),
        (["--lora-modules", "=/x"], "--lora-modules has an empty name"),
    ],
)
def test_a_name_that_stands_for_two_models_is_refused_before_anything_starts(argv, words, monkeypatch):
    monkeypatch.setattr(serve, "_serve", lambda *_: pytest.fail("it was started"))
    with pytest.raises(ConfigError, match=words):
        serve.run(parse(*argv)[0])


def test_names_that_differ_pass():
    serve.check_names(*resolve("--served-model-name", "one", "demo", "--lora-modules", "a=1", "b=1"))


def test_flags_are_not_abbreviated():
    with pytest.raises(options.UsageError, match="unknown flag --max-num-s, did you mean --max-num-seqs"):
        parse("--max-num-s", "3")


def test_negative_numbers_are_values():
    assert resolve("--seed", "-3")[0].model.seed == -3


def test_at_least_forty_flags_of_vllm_are_known_and_none_shadows_ours():
    own = set(serve.parser("x")._option_string_actions)
    assert len(vllm_flags.FLAGS) >= 40
    assert not {"--" + name for name in vllm_flags.FLAGS} & own


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--tensor-parallel-size", "several servers"),
        ("-tp", "several servers"),
        ("--trust_remote_code", "never run"),
        ("--calculate-kv-scales", "computed as it fills"),
        ("--no-enable-chunked-prefill", "cost model"),
        ("--reasoning-parser", "reasoning"),
    ],
)
def test_vllm_flags_we_lack_say_why(flag, words):
    with pytest.raises(options.UsageError, match=f"{flag.partition('=')[0].replace('_', '-')} is vLLM's; .*{words}"):
        parse(flag, "x")


def test_harmless_vllm_flags_leave_a_line_and_take_their_value_along():
    namespace, notes = parse("--enable-lora", "--swap-space", "4", "m", "--enforce_eager", "--max-seq-len-to-capture=9")
    assert namespace.model == "m"
    assert [note.split()[0] for note in notes] == [
        "--enable-lora", "--swap-space", "--enforce-eager", "--max-seq-len-to-capture",
    ]  # fmt: skip


def test_a_bad_flag_is_usage_a_bad_variable_is_configuration(monkeypatch):
    namespace, _ = parse("--max-loras", "x")
    with pytest.raises(options.UsageError, match="--max-loras must be"):
        options.resolve(namespace, AdapterConfig)
    monkeypatch.setenv("TANDEM_MAX_LORAS", "x")
    with pytest.raises(ConfigError, match="TANDEM_MAX_LORAS must be"):
        options.resolve(parse()[0], AdapterConfig)


def test_a_file_is_read(tmp_path, monkeypatch):
    monkeypatch.delenv("TANDEM_MODEL", raising=False)
    (tmp_path / "c.yaml").write_text("model: from-file\nseed: 5\n")
    engine, _ = resolve("--config", str(tmp_path / "c.yaml"), "--seed", "6")
    assert engine.model == ModelConfig(model="from-file", seed=6)
