"""The lines `tandem serve` prints."""

import asyncio

import pytest

from tandem.cli import startup
from tandem.config import ServerConfig
from tandem.work import EngineReport, EngineStats

REPORT = EngineReport(
    model="demo", architecture="LlamaForCausalLM", num_parameters=4_900_000, weight_bytes=9_800_000, load_s=0.2,
    device="x86_64", isa="AVX512+BF16", num_threads=2, dtype="bfloat16", block_size=16, num_blocks=1000,
    kv_bytes=32_000_000, max_model_len=2048, vocab_size=4096, max_num_seqs=64, kernels="torch",
)  # fmt: skip


def test_ready_lines_say_what_a_user_needs_in_few_lines():
    lines = startup.ready_lines(REPORT, ServerConfig(), 8123, 3.2)
    text = "\n".join(lines)
    assert len(lines) <= 13  # with "loading" and a warning: at most 15
    for word in ("4.9 M", "bfloat16", "9.8 MB", "0.2 s", "AVX512+BF16", "2 threads", "16,000 tokens", "64 sequences"):
        assert word in text, word
    assert "export OPENAI_BASE_URL=http://127.0.0.1:8123/v1" in lines and "export OPENAI_API_KEY=none" in lines
    assert '"model":"demo"' in lines[-1] and "Authorization" not in lines[-1]
    assert "Adapters" not in text


def test_the_api_key_is_never_printed():
    lines = startup.ready_lines(REPORT, ServerConfig(api_key="hunter2"), 8000, 1.0)
    assert "hunter2" not in "\n".join(lines) and "Authorization: Bearer $OPENAI_API_KEY" in lines[-1]


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://127.0.0.1:8000"), ("::1", "http://[::1]:")]
)
def test_urls_can_be_pasted(host, shown):
    assert shown in startup.ready_lines(REPORT, ServerConfig(host=host), 8000, 1.0)[-1]


def test_the_served_name_is_the_one_to_ask_for():
    assert '"model":"mine"' in startup.ready_lines(REPORT, ServerConfig(served_model_name=["mine", "b"]), 1, 1.0)[-1]


def test_stats_line_by_hand():
    before = EngineStats(prompt_tokens=100, generation_tokens=50, prefix_queries=10, prefix_hits=10)
    after = EngineStats(
        prompt_tokens=300, generation_tokens=90, prefix_queries=50, prefix_hits=20, num_running=3, num_waiting=1,
        blocks_used=25, blocks_total=100,
    )  # fmt: skip
    assert startup.stats_line(before, after, 10.0) == (
        "Avg prompt throughput: 20.0 tokens/s, Avg generation throughput: 4.0 tokens/s, Running: 3 reqs, "
        "Waiting: 1 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )


def test_silent_when_idle():
    assert startup.stats_line(EngineStats(prompt_tokens=5), EngineStats(prompt_tokens=5), 10.0) is None
    assert startup.stats_line(EngineStats(), EngineStats(num_waiting=1), 10.0) is not None


async def test_figures_are_printed_once_per_period_of_traffic(capsys):
    class Engine:
        stats = EngineStats()

    engine = Engine()
    printing = asyncio.create_task(startup.print_stats(engine, 0.02))
    await asyncio.sleep(0.05)
    assert capsys.readouterr().out == ""
    engine.stats = EngineStats(generation_tokens=10)
    await asyncio.sleep(0.07)
    printing.cancel()
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.50 GB")])
def test_sizes(value, text):
    assert startup.size(value) == text
