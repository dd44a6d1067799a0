"""`tandem VERB ...`: find the verb, hand it the rest of the line, turn errors into exit codes.

Exit codes: 0 ok, 1 failure, 2 usage, 3 configuration, 4 model, 5 memory budget, 130 Ctrl-C. A verb's module is imported
when the verb is typed and not before.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from tandem import __version__, errors
from tandem.cli import options

VERBS = {
    "serve": ("serve", "serve a model over the OpenAI API"),
    "chat": ("chat", "talk to a running server"),
    "complete": ("complete", "let a running server continue a text"),
    "train": ("train", "fine-tune an adapter, alone or on a running server"),
    "jobs ls": ("jobs", "list a server's fine-tuning jobs"),
    "jobs show": ("jobs", "show one of them"),
    "jobs logs": ("jobs", "print its events, -f: as they come"),
    "jobs pause": ("jobs", "let it rest"),
    "jobs resume": ("jobs", "let it go on"),
    "jobs cancel": ("jobs", "end it"),
    "adapters ls": ("adapters", "list a server's adapters and aliases"),
    "adapters load": ("adapters", "import a PEFT directory into a server"),
    "adapters unload": ("adapters", "take an adapter out of the engine's memory"),
    "adapters export": ("adapters", "fetch an adapter as a PEFT directory"),
    "adapters merge": ("adapters", "write base model + adapter as one model"),
    "adapters promote": ("adapters", "let an alias stand for an adapter"),
    "adapters rollback": ("adapters", "let it stand for the one before"),
    "adapters rm": ("adapters", "delete an adapter"),
    "data check": ("data", "check a training file and show what is learnt"),
    "bench throughput": ("bench_throughput", "measure the engine alone, offline"),
    "bench serve": ("bench_serve", "measure a running server under load"),
    "bench coserve": ("bench_coserve", "measure serving and training together against either alone"),
    "bench memory": ("bench_memory", "measure what training keeps for backward"),
    "doctor": ("doctor", "check this machine and this installation"),
    "version": ("version", "print the version"),
}
EXIT_CODES = (
    (options.UsageError, options.USAGE_ERROR),
    (errors.ConfigError, 3),
    (errors.ModelError, 4),
    (errors.BudgetError, 5),
    (MemoryError, 5),
    (errors.TandemError, 1),
)
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(args)
    except tuple(cls for cls, _ in EXIT_CODES) as error:
        print(f"tandem: {error or 'out of memory'}", file=sys.stderr)
        return next(code for cls, code in EXIT_CODES if isinstance(error, cls))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; keep the interpreter's own flush at exit from saying so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if args else options.USAGE_ERROR
    if args[0] in ("-V", "--version"):
        args[0] = "version"
    verb = " ".join(args[:2]) if " ".join(args[:2]) in VERBS else args[0]
    if verb not in VERBS:
        family = [name for name in VERBS if name.startswith(verb + " ")]
        if family and set(args[1:]) <= {"-h", "--help"}:
            print("\n".join(f"tandem {name:<18} {VERBS[name][1]}" for name in family))
            return 0 if args[1:] else options.USAGE_ERROR
        typed = " ".join(args[:2]) if family else verb
        near = difflib.get_close_matches(typed, VERBS, n=1)
        hint = f"did you mean 'tandem {near[0]}'?" if near else "try: tandem --help"
        raise options.UsageError(f"unknown command '{typed}', {hint}")
    module = importlib.import_module(f"tandem.cli.{VERBS[verb][0]}")
    parser = module.parser(f"tandem {verb}")
    return module.run(parser.parse(args[len(verb.split()) :], options.note))


def _overview() -> str:
    verbs = "\n".join(f"  {name:<18} {line}" for name, (_, line) in VERBS.items())
    return (
        f"Tandem {__version__}: one engine that serves a model and fine-tunes it.\n\n"
        f"usage: tandem COMMAND [options]\n\ncommands:\n{verbs}\n\n"
        "tandem COMMAND --help lists a command's options. Every option can also be set as TANDEM_<OPTION>.\n"
        "First steps: tandem serve, then, in another terminal, tandem chat."
    )


if __name__ == "__main__":
    sys.exit(main())
