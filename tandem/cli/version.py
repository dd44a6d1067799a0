"""`tandem version`: the version and what it runs on."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

from tandem import __version__
from tandem.cli import options


def parser(prog: str) -> options.Parser:
    """No options."""
    return options.Parser(prog=prog, description="Print the version of Tandem, Python and torch.")


def run(_namespace: argparse.Namespace) -> int:
    """Print one line; torch's version comes from its metadata, so nothing heavy is imported."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    print(f"tandem {__version__} (Python {platform.python_version()}, torch {torch})")
    return 0
