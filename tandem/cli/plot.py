"""Pictures of measurements, as PNG. The only file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.cli.coserve_figures import MODES, Row
from tandem.cli.latency import Trial


def latencies(trials: Sequence[Trial], path: str) -> None:
    """TTFT over the time of arrival, and how TTFT and gaps between tokens are distributed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [t for t in trials if t.completed]
    start = min((t.sent for t in trials), default=0.0)
    figure, (over_time, spread) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    over_time.plot([t.sent - start for t in done], [t.ttft * 1e3 for t in done], ".", label="first token")
    refused = [t.sent - start for t in trials if t.rejected]
    over_time.plot(refused, [0.0] * len(refused), "x", label="rejected")
    over_time.set(xlabel="arrival (s)", ylabel="time to first token (ms)")
    over_time.legend()
    for name, values in (("first token", [t.ttft for t in done]), ("gap", [g for t in done for g in t.gaps])):
        ordered = sorted(v * 1e3 for v in values)
        spread.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=name)
    spread.set(xlabel="milliseconds", ylabel="share of requests or gaps", xscale="log", ylim=(0, 1))
    spread.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def coserving(rows: Sequence[Row], closed: Sequence[Row], path: str) -> None:
    """Training, latencies and the share within the targets over the load, one curve per mode. Runs in a closed loop are
    points at the load that their rate comes to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        "train_tokens_per_s": ("training tokens/s", 1.0),
        "slo_attainment": ("requests within both targets (%)", 100.0),
        "ttft_p95": ("time to first token, p95 (s)", 1.0),
        "tpot_p95": ("time per output token, p95 (ms)", 1e3),
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, (key, (label, scale)) in zip(axes.flat, panels.items(), strict=True):
        for i, mode in enumerate(MODES):
            for found, style, note in ((rows, "o-", ""), (closed, "x", ", closed loop")):
                known = [r for r in found if r.mode == mode and getattr(r, key) is not None]
                if mode == "train" and key == "train_tokens_per_s" and len(known) == 1:
                    axis.axhline(getattr(known[0], key), linestyle="--", color=f"C{i}", label=mode)
                elif known and (mode != "serve" or key != "train_tokens_per_s"):
                    points = sorted((r.load, getattr(r, key) * scale) for r in known)
                    axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=mode + note)
        axis.set(xlabel="load (% of what serving alone can do)", ylabel=label, ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
