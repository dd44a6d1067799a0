"""The lines `tandem serve` prints."""

import asyncio

import msgspec
import pytest
from fake_jobs import FakeJobs

from tandem.cli import startup
from tandem.config import JobsConfig, ServerConfig
from tandem.jobs.records import JobRequest
from tandem.work import EngineReport, EngineStats

REPORT = EngineReport(
    model="demo", architecture="LlamaForCausalLM", num_parameters=4_900_000, weight_bytes=9_800_000, load_s=0.2,
    device="x86_64", isa="AVX512+BF16", num_threads=2, dtype="bfloat16", block_size=16, num_blocks=1000,
    kv_bytes=32_000_000, max_model_len=2048, vocab_size=4096, max_num_seqs=64, kernels="torch",
    calibration="measured in 2.1 s",
)  # fmt: skip


def test_ready_lines_say_what_a_user_needs_in_few_lines():
    lines = startup.ready_lines(REPORT, ServerConfig(), 8123, 3.2, JobsConfig())
    text = "\n".join(lines)
    assert len(lines) <= 13  # with "loading" and a warning: at most 15
    for word in ("4.9 M", "bfloat16", "9.8 MB", "0.2 s", "AVX512+BF16", "2 threads", "16,000 tokens", "64 sequences",
                 "calibration measured in 2.1 s"):  # fmt: skip
        assert word in text, word
    assert "export OPENAI_BASE_URL=http://127.0.0.1:8123/v1" in lines and "export OPENAI_API_KEY=none" in lines
    assert "export TINKER_BASE_URL=http://127.0.0.1:8123 TINKER_API_KEY=tml-none" in lines
    assert '"model":"demo"' in lines[-1] and "Authorization" not in lines[-1]
    assert "Adapters" not in text


def test_the_api_key_is_never_printed():
    lines = startup.ready_lines(REPORT, ServerConfig(api_key="hunter2"), 8000, 1.0, JobsConfig())
    assert "hunter2" not in "\n".join(lines) and "Authorization: Bearer $OPENAI_API_KEY" in lines[-1]


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://127.0.0.1:8000"), ("::1", "http://[::1]:")]
)
def test_urls_can_be_pasted(host, shown):
    assert shown in startup.ready_lines(REPORT, ServerConfig(host=host), 8000, 1.0, JobsConfig())[-1]


def test_the_served_name_is_the_one_to_ask_for():
    config = ServerConfig(served_model_name=["mine", "b"])
    assert '"model":"mine"' in startup.ready_lines(REPORT, config, 1, 1.0, JobsConfig())[-1]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (None, "database SQLite, in there"),
        (
            "postgresql://me:hunter2@db.test:5432/tandem?password=hunter2",
            "database postgresql://me@db.test:5432/tandem",
        ),
        ("postgresql:///tandem", "database postgresql:///tandem"),
        ("sqlite:////var/t.db", "database sqlite:////var/t.db"),
    ],
)
def test_where_the_state_is(url, shown):
    text = "\n".join(startup.ready_lines(REPORT, ServerConfig(), 1, 1.0, JobsConfig(state_dir="/s", database_url=url)))
    assert f"State    /s; {shown}\n" in text and "hunter2" not in text


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
    assert startup.stats_line(EngineStats(), EngineStats(train_tokens=1), 10.0) is not None


class Engine:
    stats = EngineStats()


async def test_figures_are_printed_once_per_period_of_traffic(capsys):
    engine, stopping = Engine(), asyncio.Event()
    printing = asyncio.create_task(startup.print_stats(engine, 0.02, None, stopping))
    await asyncio.sleep(0.05)
    assert capsys.readouterr().out == ""
    engine.stats = EngineStats(generation_tokens=10)
    await asyncio.sleep(0.07)
    stopping.set()
    await asyncio.wait_for(printing, 1)
    assert capsys.readouterr().out.count("\n") == 1


@pytest.fixture
async def jobs(tmp_path):
    """3 jobs that run among 1200, the first of them with metrics."""
    made = FakeJobs(tmp_path, Engine())
    made.kept["file"]["file-x"] = None
    for i in range(1200):
        job = await made.create(JobRequest(model="m", training_file="file-x"))
        if i % 500 == 0:
            made.kept["job"][job.job_id] = msgspec.structs.replace(job, status="running", step=40, total_steps=200)
    made.running = [job.job_id for job in made.kept["job"].values() if job.status == "running"]
    data = {"step": 40, "train_loss": 1.834, "tokens_per_s": 310.4}
    made.say(made.running[0], "Step 39/200", type="metrics", data={**data, "train_loss": 9})
    made.say(made.running[0], "Step 40/200", type="metrics", data=data)
    made.say(made.running[0], "Checkpoint created at step 40")
    return made


async def test_running_jobs_are_in_the_line(capsys, jobs):
    engine, stopping = Engine(), asyncio.Event()
    printing = asyncio.create_task(startup.print_stats(engine, 0.02, jobs, stopping))
    await asyncio.sleep(0.03)
    engine.stats = EngineStats(train_tokens=10)
    await asyncio.sleep(0.1)
    stopping.set()
    await asyncio.wait_for(printing, 1)
    out = capsys.readouterr().out
    assert f", train: job={jobs.running[0]} step 40/200 loss 1.83 310 tok/s\n" in out
    assert out.count("train: job=") == 3 and f"train: job={jobs.running[2]} step 40/200, " in out


async def test_a_database_that_refuses_ends_nothing(capsys, caplog, jobs):
    async def refuse(*_):
        raise RuntimeError("gone")

    engine, stopping, jobs.jobs = Engine(), asyncio.Event(), refuse
    printing = asyncio.create_task(startup.print_stats(engine, 0.02, jobs, stopping))
    for i in range(1, 4):
        await asyncio.sleep(0.03)
        engine.stats = EngineStats(train_tokens=i)
    await asyncio.sleep(0.05)
    stopping.set()
    await asyncio.wait_for(printing, 1)
    assert capsys.readouterr().out.count("Avg prompt") >= 2 and "cannot read the running jobs" in caplog.text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.50 GB")])
def test_sizes(value, text):
    assert startup.size(value) == text
