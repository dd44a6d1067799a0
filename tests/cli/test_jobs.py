"""`tandem jobs ...` against a stand-in server, and how a job's events are followed and shown."""

import json
import re

import pytest
from fake_finetuning import JOB, FakeFineTuning, event, page
from rich.console import Console
from rich.progress import Progress, TextColumn

from tandem.__main__ import main
from tandem.cli import follow
from tandem.jobs.records import Event

ONE = "/v1/fine_tuning/jobs/ftjob-1"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(follow.follow, "__defaults__", (0.01,))
    for name in ("TANDEM_SERVER", "TANDEM_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with FakeFineTuning({f"GET {ONE}": JOB}) as fake:
        yield fake


def test_ls_pages_through_and_aligns(server, capsys):
    jobs = [JOB | {"id": f"ftjob-{i}", "fine_tuned_model": "ft:x" if i == 3 else None} for i in range(250)]
    server.answers["GET /v1/fine_tuning/jobs"] = page(jobs)
    assert main(["jobs", "ls", "--server", server.url, "--limit", "130"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 131 and lines[0].split() == "JOB STATUS STEP CREATED MODEL FINE-TUNED MODEL".split()
    assert re.match(r"ftjob-3    running  12/88  20\d\d-\S+ \S+  demo   ft:x$", lines[4])
    assert lines[130].startswith("ftjob-129")
    assert main(["jobs", "ls", "--server", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == jobs[:20]


def test_an_empty_list_says_what_to_do(server, capsys):
    server.answers["GET /v1/fine_tuning/jobs"] = page([])
    assert main(["jobs", "ls", "--server", server.url + "/v1/"]) == 0
    assert "tandem train" in capsys.readouterr().out


def test_show_has_numbers_checkpoints_and_the_error(server, capsys):
    checkpoints = [{"id": f"c{i}", "fine_tuned_model_checkpoint": f"ft:x:{i}", "step_number": i} for i in (8, 4)]
    server.answers[f"GET {ONE}/checkpoints"] = page(checkpoints)
    server.answers[f"GET {ONE}"] = JOB | {"status": "failed", "error": {"message": "row 3 is bad"}}
    assert main(["jobs", "show", "ftjob-1", "--server", server.url]) == 0
    said = capsys.readouterr().out
    for words in (r"status +failed", r"error +row 3 is bad", r"step +12/88", r"n_epochs +3", r"rank +16",
                  r"checkpoint +ft:x:4 \(step 4\)\ncheckpoint +ft:x:8 \(step 8\)"):  # fmt: skip
        assert re.search(words, said), words
    assert "None" not in said and "total_steps" not in said


@pytest.mark.parametrize("verb", ["pause", "resume", "cancel"])
def test_verbs_that_change_a_job(server, capsys, verb):
    server.answers[f"POST {ONE}/{verb}"] = JOB | {"status": verb + "d"}
    assert main(["jobs", verb, "ftjob-1", "--server", server.url, "--api-key", "secret"]) == 0
    assert capsys.readouterr().out == f"ftjob-1 is {verb}d\n"
    assert server.asked == [(f"POST {ONE}/{verb}", {"key": "Bearer secret"})]


def test_what_the_server_refuses_is_said(server, capsys):
    server.answers[f"POST {ONE}/pause"] = (409, {"error": {"message": "it has ended"}})
    assert main(["jobs", "pause", "ftjob-1", "--server", server.url]) == 1
    assert main(["jobs", "show", "../../x", "--server", server.url]) == 1
    said = capsys.readouterr().err
    assert "it has ended" in said and "/v1/fine_tuning/jobs/..%2F..%2Fx" in said
    assert main(["jobs", "ls", "--server", "http://127.0.0.1:1"]) == 1
    assert "no server answers at http://127.0.0.1:1/v1" in capsys.readouterr().err


def test_the_server_comes_from_the_environment_too(server, capsys, monkeypatch):
    server.answers["GET /v1/fine_tuning/jobs"] = page([JOB])
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/v1")
    assert main(["jobs", "ls"]) == 0
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("TANDEM_SERVER", server.url)
    assert main(["jobs", "ls"]) == 0
    assert capsys.readouterr().out.count("ftjob-1") == 2


def test_wrong_lines(capsys):
    assert main(["jobs"]) == 2
    assert "jobs cancel" in capsys.readouterr().out
    assert main(["jobs", "show"]) == main(["jobs", "ls", "--limit", "0"]) == main(["jobs", "lss"]) == 2
    said = capsys.readouterr().err
    assert "required: JOB" in said and "--limit must be at least 1" in said and "did you mean 'tandem jobs ls'" in said


def test_logs_are_printed_once_oldest_first(server, capsys):
    events = [event(i) for i in range(249, -1, -1)]
    server.answers[f"GET {ONE}/events"] = page(events)
    assert main(["jobs", "logs", "ftjob-1", "--server", server.url]) == 0
    assert [line[20:] for line in capsys.readouterr().out.splitlines()] == [f"event {i}" for i in range(250)]


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
def test_following_ends_with_the_job(server, capsys, status, code):
    done = [event(i) for i in range(149, -1, -1)]
    server.answers[f"GET {ONE}"] = [JOB, JOB, JOB | {"status": status}]
    server.answers[f"GET {ONE}/events"] = [page(done[147:]), page(done[140:]), page(done), page(done)]
    assert main(["jobs", "logs", "-f", "ftjob-1", "--server", server.url]) == code
    assert [line[20:] for line in capsys.readouterr().out.splitlines()] == [f"event {i}" for i in range(150)]


def metrics(number, **data):
    return Event(
        event_id=str(number), job_id="j", created_at=100 + number, level="info", type="metrics",
        message=f"Step {number}/88: training loss=2.41", data={"step": number, "total_steps": 88} | data,
    )  # fmt: skip


def test_lines_say_what_the_message_does_not():
    pace = follow.Pace()
    first = metrics(10, train_loss=2.41, tokens_per_s=93.4, serving_tpot_p95_ms=41.2)
    assert follow.line(first, pace)[20:] == "Step 10/88: training loss=2.41, 93 tokens/s, serving p95 41 ms"
    second = metrics(14, train_loss=2.41, tokens_per_s=93.4, serving_tpot_p95_ms=0.0)
    assert follow.line(second, pace)[20:] == "Step 14/88: training loss=2.41, 93 tokens/s, ETA 0:01:14"
    warning = Event(event_id="x", job_id="j", created_at=0, level="warn", message="the disk is nearly full")
    assert follow.line(warning, pace)[20:] == "WARN the disk is nearly full"


def test_the_pace_forgets_what_lies_before_a_resume():
    pace = follow.Pace()
    for at, step in ((0, 1), (10, 2), (20, 3)):
        pace.add(at, step)
    assert pace.remaining_s(5) == 20
    pace.add(1000, 2)
    assert pace.remaining_s(5) is None
    pace.add(1001, 3)
    assert pace.remaining_s(5) == 2


def test_the_bar_shows_step_loss_speed_and_time():
    console = Console(force_terminal=True, width=120, record=True)
    with Progress(TextColumn("{task.completed:.0f}/{task.fields[of]} {task.fields[now]}"), console=console) as progress:
        bar = follow.Bar(progress)
        bar(Event(event_id="m", job_id="j", created_at=1, level="info", message="Created [bold]job[/bold]: ftjob-1"))
        bar(metrics(10, train_loss=2.4, tokens_per_s=90.0))
        bar(metrics(20, train_loss=0.5, valid_loss=0.75, tokens_per_s=91.0, serving_tpot_p95_ms=41.0))
    said = console.export_text()
    assert "Created [bold]job[/bold]: ftjob-1" in said  # brackets are no markup
    assert "20/88 loss 0.5000, validation loss 0.7500, 91 tokens/s, serving p95 41 ms, ETA 0:01:08" in said


def test_without_a_terminal_there_are_lines(capsys):
    with follow.display() as show:
        show(metrics(3, tokens_per_s=5.0))
    assert capsys.readouterr().out[20:] == "Step 3/88: training loss=2.41, 5 tokens/s\n"
