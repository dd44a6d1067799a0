"""`tandem chat`: a conversation with a running server, line by line or one quick question."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.cli import client, options
from tandem.config import option
from tandem.errors import TandemError

if TYPE_CHECKING:
    import httpx

HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer"


@dataclass(frozen=True)
class ChatOptions:
    """The conversation."""

    system_prompt: str | None = option(None, "instruction before the first message")
    max_tokens: int | None = option(None, "longest answer in tokens", low=1)
    temperature: float | None = option(None, "0 always takes the likeliest token (default: the server's)", low=0.0)


def parser(prog: str) -> options.Parser:
    """Server, conversation and --quick."""
    made = options.Parser(prog=prog, description="Talk to a running server. " + HELP + ".")
    made.add_argument("-q", "--quick", metavar="MESSAGE", help="ask once, print the answer, end")
    options.add(made, client.ServerAddress, ChatOptions)
    return made


def run(namespace: argparse.Namespace) -> int:
    """Answer --quick, or read lines until /exit or the end of input."""
    address, chat = options.resolve(namespace, client.ServerAddress, ChatOptions)
    with client.connect(address) as http:
        settings = {"model": client.model_name(http, address), **sampling(chat)}
        opening = [{"role": "system", "content": chat.system_prompt}] if chat.system_prompt else []
        if namespace.quick is not None:
            answer(http, settings, [*opening, {"role": "user", "content": namespace.quick}])
            return 0
        converse(http, settings, opening)
    return 0


def sampling(chat: ChatOptions) -> dict[str, float]:
    """The request fields of the options that were given."""
    given = {"max_tokens": chat.max_tokens, "temperature": chat.temperature}
    return {name: value for name, value in given.items() if value is not None}


def converse(http: httpx.Client, settings: dict, opening: list[dict[str, str]]) -> None:
    """The loop: read a line, stream the answer, remember both."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing and history for input()

        print(f"Talking to {settings['model']}. {HELP}.")
    messages = list(opening)
    while (line := read_line("> ")) not in (None, "/exit", "/quit"):
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(f"unknown command {line}: {HELP}")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*asked, {"role": "assistant", "content": answer(http, settings, asked)}]
            except TandemError as error:
                # The conversation goes on without the line that failed.
                print(f"tandem: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(" (stopped)")


def read_line(prompt: str) -> str | None:
    """One stripped line from the user; None at the end of input. The prompt shows on a terminal only."""
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def answer(http: httpx.Client, settings: dict, messages: list[dict[str, str]]) -> str:
    """Print the streamed answer as it comes and return it whole."""
    pieces = []
    for piece in client.stream_text(http, "chat/completions", {**settings, "messages": messages}):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)
