"""`tandem train`: on a stand-in server; alone, with the real job store on an engine that pretends; from a config."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from fake_finetuning import JOB, FakeFineTuning, event, page

from tandem.__main__ import main
from tandem.cli import axolotl, follow
from tandem.config import options_of
from tandem.engine.client import EngineClient
from tandem.errors import BudgetError, ConfigError
from tandem.jobs.recipe import OPTIMIZER_RATES

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
from fake_engine import FakeEngine  # noqa: E402

ONE = "/v1/fine_tuning/jobs/ftjob-1"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, tmp_path):
    monkeypatch.setattr(follow.follow, "__defaults__", (0.01,))
    for name in [name for name in os.environ if name.startswith("TANDEM_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": f"Fact {i}?", "completion": f" It is {i * 7}."} for i in range(8)]
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# ---------------------------------------------------------------- on a server


@pytest.fixture
def server():
    finished = JOB | {"status": "succeeded", "fine_tuned_model": "ft:demo:t::x", "trained_tokens": 1234}
    with FakeFineTuning({}) as fake:
        fake.answers |= {
            "GET /v1/models": {"data": [{"id": "served"}]},
            "POST /v1/files": [{"id": "file-train"}, {"id": "file-valid"}],
            "POST /v1/fine_tuning/jobs": JOB,
            f"GET {ONE}": [JOB, finished],
            f"GET {ONE}/events": page([event(2, "The job has successfully completed"), event(1)]),
        }
        yield fake


def test_a_job_on_a_server_is_what_was_asked_for(server, data, capsys):
    options = "--rank 8 --alpha 16 --target-modules q_proj v_proj --epochs 3 --batch-size 4 --learning-rate 1e-3"
    more = "--schedule cosine --warmup-steps 0 --dropout 0.1 --max-seq-len 64 --suffix mine --seed 7 --use-rslora"
    argv = ["train", "--server", server.url, "--data", str(data), "--validation", str(data), "--model", "big"]
    argv += ["--optimizer", "lion"]
    assert main([*argv, *options.split(), *more.split(), "--format", "completion", "--api-key", "k"]) == 0
    (body,) = server.bodies("POST /v1/fine_tuning/jobs")
    assert body == {
        "model": "big", "training_file": "file-train", "validation_file": "file-valid", "suffix": "mine", "seed": 7,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}},
        "tandem": {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj", "v_proj"], "learning_rate": 1e-3,
                   "optimizer": "lion", "schedule": "cosine", "warmup_steps": 0, "dropout": 0.1, "max_seq_len": 64,
                   "use_rslora": True, "format": "completion"},
        "key": "Bearer k",
    }  # fmt: skip
    upload = server.bodies("POST /v1/files")[0]
    assert upload["purpose"] == (None, "fine-tune") and upload["file"] == ("facts.jsonl", data.read_text())
    said = capsys.readouterr().out.splitlines()
    assert [line[20:] for line in said[:2]] == ["event 1", "The job has successfully completed"]
    assert "ft:demo:t::x, 1,234 tokens" in said[2]
    assert f"tandem chat --url {server.url}/v1 --model-name ft:demo:t::x" in said[3]


def test_the_body_is_one_that_our_api_takes(server, data):
    from tandem.api.finetuning_schemas import JobBody

    main(["train", "--server", server.url, "--data", str(data), "--weight-decay", "0.1", "--priority", "1",
          "--max-grad-norm", "0", "--checkpoint-every", "5", "--validate-every", "6", "--epochs", "2"])  # fmt: skip
    (body,) = server.bodies("POST /v1/fine_tuning/jobs")
    assert body.pop("key") is None
    request = JobBody.model_validate(body).to_record()
    assert request.model == "served" and request.n_epochs == 2 and request.batch_size == "auto"
    extras = request.tandem
    assert (extras.weight_decay, extras.priority, extras.max_grad_norm) == (0.1, 1, 0.0)
    assert (extras.checkpoint_every, extras.validate_every, extras.rank) == (5, 6, 16)


def test_detach_prints_the_id(server, data, capsys):
    assert main(["train", "--server", server.url, "--data", str(data), "--detach"]) == 0
    said = capsys.readouterr()
    assert said.out == "ftjob-1\n" and f"tandem jobs logs -f ftjob-1 --server {server.url}" in said.err
    assert f"GET {ONE}" not in [route for route, _ in server.asked]


def test_a_failed_job_is_an_error(server, data, capsys):
    server.answers[f"GET {ONE}"] = JOB | {"status": "failed", "error": {"message": "facts.jsonl:3: is not JSON"}}
    assert main(["train", "--server", server.url, "--data", str(data)]) == 1
    assert "the job failed: facts.jsonl:3: is not JSON" in capsys.readouterr().err


def test_a_server_that_goes_away_is_not_the_end_of_the_job(server, data, capsys):
    server.answers[f"GET {ONE}"] = [JOB, (503, {"error": {"message": "the engine is gone"}})]
    assert main(["train", "--server", server.url, "--data", str(data)]) == 1
    said = capsys.readouterr().err
    assert "the engine is gone" in said and "tandem jobs logs -f ftjob-1" in said


def test_ctrl_c_detaches(server, data):
    server.answers[f"GET {ONE}"] = JOB
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem", "train", "--server", server.url, "--data", str(data)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    while f"GET {ONE}/events" not in [route for route, _ in server.asked]:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "The job goes on" in said and "tandem jobs cancel ftjob-1" in said and "Traceback" not in said
    assert not [route for route, _ in server.asked if "cancel" in route]


@pytest.mark.parametrize(
    ("argv", "words", "code"),
    [
        (["--device", "cpu", "--train-window", "64"], "--device, --train-window: with --server", 2),
        (["--init-from", "."], "tandem adapters load NAME .", 3),
        (["--output", "."], "exists already", 3),
    ],
)
def test_what_a_server_cannot_be_told(server, data, capsys, argv, words, code):
    assert main(["train", "--server", server.url, "--data", str(data), *argv]) == code
    assert words in capsys.readouterr().err and server.asked == []


# ---------------------------------------------------------------- alone


class AloneEngine(FakeEngine):
    """The job store's fake engine, as something that starts, dies and closes."""

    def __init__(self, **knobs):
        super().__init__(**knobs)
        self.report = SimpleNamespace(hidden_size=512, max_model_len=256, architecture="Fake", num_parameters=1,
                                      dtype="float32", device="cpu", num_threads=1)  # fmt: skip
        self.death = asyncio.Event()
        self.kinds = set()

    def _update(self, run_id, params):
        self.kinds.add(params[0].kind if isinstance(params, tuple) else params.kind)
        return super()._update(run_id, params)

    async def wait_dead(self):
        await self.death.wait()
        return "the engine process ended with code 9"

    async def close(self):
        self.closed = True


@pytest.fixture
def alone(monkeypatch):
    """alone(**knobs): the engine that the next runs get; returns those that were started."""
    started = []

    def use(**knobs):
        async def start(config, on_progress=None):
            started.append(AloneEngine(**knobs))
            started[-1].config = config
            return started[-1]

        monkeypatch.setattr(EngineClient, "start", start)
        return started

    return use


def test_alone_the_adapter_is_left_in_output(alone, data, capsys, tmp_path):
    started = alone()
    assert main(["train", "--data", str(data), "--validation", str(data), "--epochs", "2", "--batch-size", "4",
                 "--rank", "4", "--suffix", "facts", "--output", "out", "--num-threads", "1"]) == 0  # fmt: skip
    output = tmp_path / "out"
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoint-2", "checkpoint-4", "metrics.csv",
    ]  # fmt: skip
    assert json.loads((output / "adapter_config.json").read_text())["r"] == 4
    last = (output / "checkpoint-4" / "adapter_model.safetensors").read_text()
    assert (output / "adapter_model.safetensors").read_text() == last
    assert (output / "checkpoint-2" / "adapter_model.safetensors").read_text() != last
    assert len((output / "metrics.csv").read_text().splitlines()) == 5
    said = capsys.readouterr().out
    assert "Step 4/4: training loss=" in said and f"--lora-modules facts={output}" in said
    (engine,) = started
    assert engine.closed and engine.config.model.num_threads == 1
    assert not engine.runs


def test_alone_the_seed_decides(alone, data, tmp_path):
    alone()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(["train", "--data", str(data), "--epochs", "1", "--output", name, "--seed", str(seed)]) == 0
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_text() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("kind", OPTIMIZER_RATES)
def test_alone_by_any_optimizer(alone, data, kind):
    started = alone()
    argv = ["train", "--data", str(data), "--epochs", "1", "--output", "out", "--optimizer", kind]
    assert main([*argv, "--learning-rate", "1e-3"]) == 0
    (engine,) = started
    if kind == "mezo":  # forward passes alone: no gradient, no update
        assert {"probe"} == {name for name, *_ in engine.calls} & {"probe", "forward_backward", "optim_step"}
    else:
        assert engine.kinds == {kind}


def test_alone_an_optimizer_without_a_usual_rate_wants_one(alone, data, capsys):
    started = alone()
    assert main(["train", "--data", str(data), "--optimizer", "mezo"]) == 1
    assert "mezo has no learning rate that suits most models: give one" in capsys.readouterr().err and not started


def test_alone_from_an_adapter(alone, data, tmp_path):
    started = alone()
    parent = tmp_path / "parent"
    parent.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}
    (parent / "adapter_config.json").write_text(json.dumps(config))
    for name in ("adapter_model.safetensors", "state.json"):
        (parent / name).write_text("0" * 100)
    assert main(["train", "--data", str(data), "--init-from", "parent", "--output", "out"]) in (0, 1)
    lora = next(call[1] for call in started[0].calls if call[0] == "check_run")
    assert (lora.rank, lora.alpha, lora.target_modules) == (4, 8.0, ("q_proj", "v_proj"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_alone_an_interrupted_run_goes_on(alone, data, capsys, tmp_path, monkeypatch, number, code):
    argv = ["train", "--data", str(data), "--epochs", "5", "--batch-size", "2", "--learning-rate", "1e-3"]
    alone()
    assert main([*argv, "--output", "whole"]) == 0
    started = alone(delay=0.005)
    shown, real = [], follow.line

    def line(event, pace):
        if (event.data or {}).get("step") == 6 and not shown:
            shown.append(event)
            os.kill(os.getpid(), number)
        return real(event, pace)

    monkeypatch.setattr(follow, "line", line)
    assert main([*argv, "--output", "out"]) == code
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_config.json").exists()

    # Another run's options do not go on with this one.
    assert main([*argv, "--output", "out", "--rank", "4"]) == 3
    assert "(alpha" not in (said := capsys.readouterr().err) and "other options (rank)" in said

    assert main([*argv, "--output", "out"]) == 0
    said = capsys.readouterr()
    assert "Going on" in said.err and "resumed from step" in said.out
    whole, first, second = ([name for name, *_ in engine.calls].count("optim_step") for engine in started)
    assert whole == first + second == 20 and first and second  # no step is lost, none is done twice
    whole, out = ((tmp_path / name / "adapter_model.safetensors").read_text() for name in ("whole", "out"))
    assert whole == out


def test_alone_a_dead_engine_is_said_and_nothing_is_lost(alone, data, capsys, monkeypatch, tmp_path):
    started = alone(delay=0.005)
    real = follow.line

    def line(event, pace):
        if (event.data or {}).get("step") == 3:
            started[0].death.set()
        return real(event, pace)

    monkeypatch.setattr(follow, "line", line)
    argv = ["train", "--data", str(data), "--epochs", "5", "--batch-size", "2", "--output", "out"]
    assert main(argv) == 1
    assert "ended with code 9; the same command goes on" in capsys.readouterr().err
    assert main(argv) == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_alone_a_job_that_diverges_leaves_its_checkpoints(alone, data, capsys, monkeypatch, tmp_path):
    started = alone()
    original = AloneEngine.__init__

    def diverging(self, **knobs):
        original(self, **knobs)
        self.diverge_at = 4

    monkeypatch.setattr(AloneEngine, "__init__", diverging)
    argv = ["train", "--data", str(data), "--epochs", "3", "--batch-size", "4", "--output", "out"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "the job failed: Training diverged at step 4" in said and "has checkpoint-2" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"] and started[0].closed


def test_alone_what_never_began_leaves_nothing(alone, data, capsys, monkeypatch, tmp_path):
    before = sorted(tmp_path.iterdir())
    alone(longest=1)
    assert main(["train", "--data", str(data)]) == 5
    assert "needs 9 GB" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "completion": "y"}\nnothing\n')
    alone()
    assert main(["train", "--data", str(bad)]) == 1
    assert "bad.jsonl:2" in capsys.readouterr().err
    assert main(["train", "--data", str(data), "--suffix", "No Good"]) == 1

    async def start(config, on_progress=None):
        raise BudgetError("the model does not fit")

    monkeypatch.setattr(EngineClient, "start", start)
    assert main(["train", "--data", str(data)]) == 5
    bad.unlink()
    assert sorted(tmp_path.iterdir()) == before


def test_alone_an_output_with_something_in_it_is_refused(alone, data, capsys, tmp_path):
    started = alone()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert main(["train", "--data", str(data), "--output", "out"]) == 3
    assert "exists already" in capsys.readouterr().err and not started
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_alone_two_runs_never_share_an_output(alone, data, capsys):
    alone(delay=0.05)
    from tandem.cli.train_output import Output

    with Output(Path("out").absolute(), {}).opened():
        assert main(["train", "--data", str(data), "--output", "out"]) == 3
        assert "another run writes to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words", "code"),
    [
        ([], "--data FILE is missing", 2),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl is not a file", 3),
        (["--data", "facts.jsonl", "--detach"], "--detach needs --server", 2),
        (["--data", "facts.jsonl", "--api-key", "k"], "--api-key needs --server", 2),
        (["--data", "facts.jsonl", "--rank", "0"], "--rank must be at least 1", 2),
        (["--data", "facts.jsonl", "--epoch", "3"], "did you mean --epochs", 2),
        (["--data", "facts.jsonl", "--init-from", "nowhere"], "cannot be read as PEFT's", 4),
        (["nowhere.yaml"], "cannot read the config file nowhere.yaml", 3),
    ],
)
def test_wrong_lines(alone, data, capsys, argv, words, code):
    alone()
    assert main(["train", *argv]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


# ---------------------------------------------------------------- from a file


AXOLOTL = """
base_model: big/model
datasets:
  - path: facts.jsonl
    type: chat_template
test_datasets: [{path: facts.jsonl}]
adapter: lora
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
sequence_len: 128
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
learning_rate: 2e-4
lr_scheduler: cosine
optimizer: adamw_torch
warmup_steps: 10
weight_decay: 0.01
output_dir: here
wandb_project:
sample_packing: true
"""


def translate(text, notes=None):
    from tandem.cli import train

    note = (lambda line: None) if notes is None else notes.append
    return axolotl.translate(yaml.safe_load(text), options_of(*train.CLASSES), "c.yaml", note)


def test_axolotls_keys():
    notes = []
    assert translate(AXOLOTL, notes) == {
        "model": "big/model", "data": "facts.jsonl", "validation": "facts.jsonl", "format": "chat", "rank": 32,
        "alpha": 64, "dropout": 0.05, "target_modules": ["all-linear"], "max_seq_len": 128, "batch_size": 8,
        "epochs": 3, "learning_rate": "2e-4", "schedule": "cosine", "warmup_steps": 10, "weight_decay": 0.01,
        "output": "here", "optimizer": "adamw",
    }  # fmt: skip
    assert [line.split()[1] for line in notes] == ["adapter", "sample_packing"]


@pytest.mark.parametrize(("theirs", "ours"), [("adamw_bnb_8bit", "adamw8bit"), ("lion_pytorch", "lion"), ("mezo",) * 2])
def test_optimizers_by_axolotls_names_and_our_own(theirs, ours):
    assert translate(f"optimizer: {theirs}") == {"optimizer": ours}


def test_our_own_keys_pass_with_either_dash():
    text = "data: f\nmax-seq-len: 12\ntarget_modules: [q_proj]\ndtype: float32\nserver: x\nchat_template: t.jinja"
    assert translate(text) == yaml.safe_load(text.replace("max-seq-len", "max_seq_len"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_rr: 3", "unknown option 'lora_rr', did you mean 'lora_r'"),
        ("warmup_ratio: 0.1", "unknown option 'warmup_ratio'"),
        ("rank: 3\nlora_r: 4", "lora_r and rank both say rank"),
        ("adapter: qlora", "adapter: 'qlora' is not supported"),
        ("load_in_4bit: true", "'load_in_4bit|load_in_4bit: True is not supported"),
        ("val_set_size: 0.1", "split the file yourself"),
        ("datasets: [{path: a}, {path: b}]", "put all rows into one file"),
        ("datasets: [{path: a, type: orpo}]", "must be one of chat_template, alpaca"),
        ("datasets: [{path: a, field_messages: m}]", "'field_messages' is not supported"),
        ("datasets: [{path: a, type: alpaca}]\ntest_datasets: [{path: b, type: sharegpt}]", "another type"),
        ("micro_batch_size: 0", "at least 1"),
        ("lr_scheduler: one_cycle", "must be one of constant"),
        ("optimizer: lamb", "must be one of adamw_torch"),
    ],
)
def test_nothing_in_a_config_is_dropped(text, words):
    with pytest.raises(ConfigError, match=words):
        translate(text)


def test_a_config_file_trains_and_flags_win(server, data, capsys):
    Path("c.yaml").write_text(f"datasets: [{{path: {data.name}, type: alpaca}}]\nlora_r: 8\nserver: {server.url}\n")
    assert main(["train", "c.yaml", "--rank", "2", "--detach"]) == 0
    (body,) = server.bodies("POST /v1/fine_tuning/jobs")
    assert body["tandem"] == {"rank": 2, "format": "alpaca"} and body["model"] == "served"
    Path("c.yaml").write_text("lora_r: many\n")
    assert main(["train", "c.yaml", "--data", data.name]) == 3
    assert "c.yaml: rank must be a whole number" in capsys.readouterr().err


# ---------------------------------------------------------------- methods


GRADER = {"type": "string_check", "name": "x", "input": "{{sample.output_text}}", "reference": "{{item.answer}}",
          "operation": "ne"}  # fmt: skip


@pytest.fixture
def questions(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Fact {i}?"}], "answer": str(i)} for i in range(8)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "grader.json").write_text(json.dumps(GRADER))
    return ["train", "--data", "questions.jsonl", "--method", "reinforcement", "--grader", "grader.json"]


def test_reinforcement_on_a_server(server, questions):
    flags = "--group-size 4 --max-tokens 9 --loss cispo --validate-every 3 --epochs 2 --detach"
    assert main([*questions, "--server", server.url, *flags.split()]) == 0
    (body,) = server.bodies("POST /v1/fine_tuning/jobs")
    assert body["method"] == {
        "type": "reinforcement",
        "reinforcement": {"hyperparameters": {"n_epochs": 2, "eval_interval": 3}, "grader": GRADER},
    }
    assert body["tandem"] == {"group_size": 4, "max_tokens": 9, "loss": "cispo"}


def test_preferences_on_a_server(server, data):
    argv = ["train", "--data", str(data), "--server", server.url, "--detach", "--method", "dpo", "--beta", "0.3"]
    assert main(argv) == 0
    (body,) = server.bodies("POST /v1/fine_tuning/jobs")
    assert body["method"] == {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}} and body["tandem"] == {}


def test_reinforcement_alone(alone, questions, capsys):
    argv = [*questions, "--max-tokens", "3", "--epochs", "2", "--batch-size", "4", "--output", "out"]
    assert main(argv) == 0
    assert Path("out/adapter_model.safetensors").exists()
    assert "Step 4/4: mean reward=1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "content", "code", "words"),
    [
        (["--method", "supervised"], GRADER, 2, "--method reinforcement"), ([], [1], 3, "JSON object"),
        ([], None, 3, "cannot read"), ([], GRADER | {"operation": "x"}, 1, "operation"),
        ([], GRADER | {"reference": "{{item.none}}"}, 1, "questions.jsonl:1: has no item.none"),
        ([], {"type": "python"}, 1, "endpoint"), (["--beta", "0.1"], GRADER, 1, "dpo"),
    ],
)  # fmt: skip
def test_reinforcement_that_cannot_work(alone, questions, capsys, flags, content, code, words):
    Path("grader.json").write_text("{" if content is None else json.dumps(content))
    assert main([*questions, *flags]) == code
    assert words in "".join(capsys.readouterr())


def test_reinforcement_wants_a_grader(questions, capsys):
    assert main(questions[:-2]) == 2
    assert "--grader" in capsys.readouterr().err
