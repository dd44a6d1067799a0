"""Pictures of measurements, as PNG. The only file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

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
