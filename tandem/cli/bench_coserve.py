"""`tandem bench coserve`: serving, training, both in one engine, both in turns, both in two processes, under the loads
of a trace. What is measured and in which order is `coserve_plan`; here are the command line and the end.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import signal
from collections.abc import Coroutine
from typing import Any

from tandem.cli import coserve_figures, options, serve
from tandem.cli.coserve_options import CoserveOptions, PeerOptions
from tandem.cli.coserve_plan import Plan
from tandem.cli.coserve_report import Report
from tandem.config import EngineConfig
from tandem.errors import ConfigError, TandemError


def parser(prog: str) -> options.Parser:
    """The engine's options, those of the measurement and of the peers."""
    made = options.Parser(prog=prog, description="Measure serving and training in one engine against their rivals.")
    serve.add_model(made)
    options.add_config_file(made)
    options.add(made, CoserveOptions, PeerOptions)
    # What the measurement itself decides.
    options.add(made, EngineConfig, skip=(
        "model", "share_forward", "slo_ttft_ms", "enable_prefix_caching",
        "train_resident_bytes", "max_resident_runs", "train_spill_dir",
    ))  # fmt: skip
    return made


def run(namespace: argparse.Namespace) -> int:
    """Measure, print, write, draw."""
    serve.one_model(namespace)
    wanted, peers, config = options.resolve(namespace, CoserveOptions, PeerOptions, EngineConfig)
    plan = Plan(wanted, peers, config)
    if wanted.plot and not importlib.util.find_spec("matplotlib"):
        raise ConfigError("--plot needs matplotlib: pip install 'tandem-llm[bench]', or leave --plot out")
    report = asyncio.run(_interruptible(plan.measure()))
    if wanted.plot:
        from tandem.cli.plot import coserving

        coserving(report.rows, report.closed_rows, wanted.plot)
    print("\n".join(["", *coserve_figures.verdicts(report.rows, report.closed_rows)]))
    return 0


async def _interruptible(work: Coroutine[Any, Any, Report]) -> Report:
    """Let SIGTERM end the work as Ctrl-C does: with everything that was started."""
    task, loop, is_stopped = asyncio.current_task(), asyncio.get_running_loop(), False
    assert task is not None

    def stop() -> None:
        nonlocal is_stopped
        is_stopped = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        return await work
    except asyncio.CancelledError:
        if is_stopped:
            task.uncancel()
            raise TandemError("stopped by SIGTERM") from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
