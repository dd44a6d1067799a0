"""Command-line flags made from the dataclasses of `config.py`, and the errors for flags that are not there.

Spelling is forgiving as in vLLM: underscores count as dashes. Conversion and precedence live in `config.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tandem import config
from tandem.cli import vllm_flags
from tandem.errors import TandemError

USAGE_ERROR = 2


class UsageError(TandemError):
    """The command line itself is wrong; exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError, knows near misses and answers flags of vLLM's that Tandem lacks."""

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (try: {self.prog} --help)")

    def parse(self, argv: Sequence[str], note: Callable[[str], None]) -> argparse.Namespace:
        """The namespace of `argv`; `note` gets one line for each flag that is accepted and has no effect."""
        return self.parse_args(self._recognised([_dashed(arg) for arg in argv], note))

    def _recognised(self, argv: list[str], note: Callable[[str], None]) -> list[str]:
        known, rest = self._option_string_actions, iter(argv)
        kept: list[str] = []
        for arg in rest:
            flag = arg.partition("=")[0]
            if arg == "--":
                return [*kept, arg, *rest]
            if not flag.startswith("-") or flag in known or _is_number(flag) or flag == "-":
                kept.append(arg)
                continue
            foreign = vllm_flags.lookup(flag)
            if foreign is None:
                near = difflib.get_close_matches(flag, known, n=1)
                hint = f", did you mean {near[0]}?" if near else f" (try: {self.prog} --help)"
                raise UsageError(f"unknown flag {flag}{hint}")
            if not foreign.harmless:
                raise UsageError(f"{flag} is vLLM's; Tandem does not support it because {foreign.reason}")
            note(f"{flag} is accepted and has no effect: {foreign.reason}")
            if foreign.takes_value and "=" not in arg:
                next(rest, None)
        return kept


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=120)


def _dashed(arg: str) -> str:
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def add(parser: argparse.ArgumentParser, *classes: type, skip: Sequence[str] = ()) -> None:
    """A flag per field of the config classes, one group per class, except for the names in `skip`."""
    for cls in classes:
        kinds: list[type] = list(typing.get_type_hints(cls).values())
        nested = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        if nested:
            add(parser, *nested, skip=skip)
            continue
        group = parser.add_argument_group((cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip("."))
        for opt in config.options_of(cls).values():
            if opt.name not in skip:
                _add_one(group, opt)


def _add_one(group: argparse._ArgumentGroup, opt: config.Option) -> None:
    text = opt.help.replace("%", "%%")
    if opt.default not in (None, [], "") and opt.kind is not bool:
        text += f" (default: {opt.default})"
    shared: dict[str, Any] = {"dest": opt.name, "default": argparse.SUPPRESS}
    if opt.kind is bool:
        text += f" (default: {'yes' if opt.default else 'no'})"
        negatable = argparse.BooleanOptionalAction if not opt.name.startswith("disable_") else "store_true"
        group.add_argument(opt.flag, action=negatable, help=text, **shared)
        return
    metavar = opt.metavar or ("{" + ",".join(opt.choices) + "}" if opt.choices else opt.kind.__name__.upper())
    if opt.is_list:
        group.add_argument(opt.flag, nargs="+", action="extend", metavar=metavar, help=text, **shared)
    else:
        group.add_argument(opt.flag, metavar=metavar, help=text, **shared)


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """--config, for the verbs whose options may come from a file."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with options, one `name: value` a line")


def resolve(namespace: argparse.Namespace, *classes: type) -> list[Any]:
    """One instance per class: flags, then TANDEM_ variables, then --config (or what a verb made of that file and left
    in `config_entries`), then defaults.

    A flag's bad value is a UsageError, one from elsewhere a ConfigError.
    """
    given = vars(namespace)
    known = config.options_of(*classes)
    flags = {name: value for name, value in given.items() if name in known}
    for name, value in flags.items():
        try:
            config.convert(known[name], value, known[name].flag)
        except config.ConfigError as error:
            raise UsageError(str(error)) from None
    return config.resolve(classes, flags, given.get("config"), given.get("config_entries"))


def note(line: str) -> None:
    """One line for the person at the terminal, beside whatever goes to standard output."""
    print(line, file=sys.stderr, flush=True)


def names(*classes: type) -> list[str]:
    """The option names of config classes, for `skip`."""
    return list(config.options_of(*classes))
