"""`tandem complete`: a running server continues a text, given on the command line or on standard input."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from tandem.cli import client, options
from tandem.config import option


@dataclass(frozen=True)
class CompleteOptions:
    """The continuation."""

    max_tokens: int = option(128, "longest continuation in tokens", low=1)
    temperature: float | None = option(None, "0 always takes the likeliest token (default: the server's)", low=0.0)


def parser(prog: str) -> options.Parser:
    """Server, continuation and the text."""
    made = options.Parser(prog=prog, description="Let a running server continue a text.")
    made.add_argument("text", nargs="?", metavar="TEXT", help="what to continue (default: standard input)")
    made.add_argument("-q", "--quick", metavar="TEXT", help="the same, as vLLM spells it")
    options.add(made, client.ServerAddress, CompleteOptions)
    return made


def run(namespace: argparse.Namespace) -> int:
    """Print the text's continuation as it comes."""
    text = namespace.quick if namespace.quick is not None else namespace.text
    if text is None:
        text = sys.stdin.read()
    address, wanted = options.resolve(namespace, client.ServerAddress, CompleteOptions)
    body: dict[str, object] = {"prompt": text, "max_tokens": wanted.max_tokens}
    if wanted.temperature is not None:
        body["temperature"] = wanted.temperature
    with client.connect(address) as http:
        body["model"] = client.model_name(http, address)
        for piece in client.stream_text(http, "completions", body):
            print(piece, end="", flush=True)
    print()
    return 0
