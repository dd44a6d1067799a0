"""Finding the verb, and the exit code of each kind of error."""

import sys
import types

import pytest

from tandem import __main__ as main_module
from tandem import errors
from tandem.__main__ import main
from tandem.cli import options


def run_with(monkeypatch, error):
    """main's exit code where the verb raises `error`."""

    def run(_):
        raise error

    verb = types.SimpleNamespace(parser=lambda prog: options.Parser(prog=prog), run=run)
    monkeypatch.setitem(sys.modules, "tandem.cli.broken", verb)
    monkeypatch.setitem(main_module.VERBS, "broken", ("broken", ""))
    return main(["broken"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (options.UsageError("u"), 2),
        (errors.ConfigError("c"), 3),
        (errors.ModelError("m"), 4),
        (errors.BudgetError("b"), 5),
        (MemoryError(), 5),
        (errors.EngineDead("e"), 1),
        (errors.TandemError("t"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    assert run_with(monkeypatch, error) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if not isinstance(error, KeyboardInterrupt):
        assert said.startswith("tandem: ") and said.count("\n") == 1


def test_what_is_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, ZeroDivisionError())


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in main_module.VERBS)
    assert main([]) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serv"], "did you mean 'tandem serve'"),
        (["qwertz"], "try: tandem --help"),
        (["bench", "serv"], "did you mean 'tandem bench serve'"),
        (["serve", "--max-modle-len", "4"], "did you mean --max-model-len"),
        (["serve", "--tensor-parallel-size", "2"], "--tensor-parallel-size is vLLM's; Tandem does not support it"),
        (["serve", "--port", "x"], "--port must be a whole number"),
        (["serve", "a", "b"], "unrecognized arguments: b"),
        (["serve", "a", "--model", "b"], "one model at a time"),
        (["chat", "--quick"], "expected one argument"),
        (["bench", "throughput", "--workloads", "4x4"], "BATCHxPROMPTxGENERATED"),
    ],
)
def test_wrong_command_lines(capsys, argv, words):
    assert main(argv) in (2, 3)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_families_list_their_members(capsys):
    assert main(["bench"]) == 2
    assert "bench throughput" in capsys.readouterr().out
    assert main(["bench", "--help"]) == 0


def test_version(capsys):
    assert main(["version"]) == main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tandem 0.")
