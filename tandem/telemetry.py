"""What the server counts, and its Prometheus text under `tandem:*` names and vLLM's.

Histograms here cost a bisect and two additions, because some are fed once per token. Knows figures, not requests,
routes or processes: the HTTP side observes, the engine's own counters come in as `EngineStats`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from tandem.work import EngineReport, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# vLLM's bucket edges, so that its dashboards' quantiles mean the same here.
TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
          160.0, 640.0, 2560.0)  # fmt: skip
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
               80.0)  # fmt: skip
REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
             960.0, 1920.0, 7680.0)  # fmt: skip
TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5)
CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
FINISH_REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """Counts of observations at most as large as each edge (seconds or tokens)."""

    __slots__ = ("edges", "counts", "total")

    def __init__(self, edges: Iterable[float]) -> None:
        self.edges = tuple(edges)
        self.counts = [0] * (len(self.edges) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.total += value

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """(upper edge, observations up to it), the last one `+Inf`."""
        running = 0
        for edge, count in zip((*map(str, self.edges), "+Inf"), self.counts, strict=True):
            running += count
            yield edge, running


def _histogram(edges: tuple[float, ...]) -> Histogram:
    return field(default_factory=lambda: Histogram(edges))


@dataclass(slots=True)
class Telemetry:
    """What the HTTP process sees of its requests. Times in seconds, from the arrival of the body to the writing."""

    time_to_first_token: Histogram = _histogram(TTFT_S)
    inter_token_latency: Histogram = _histogram(PER_TOKEN_S)
    time_per_output_token: Histogram = _histogram(PER_TOKEN_S)
    e2e_latency: Histogram = _histogram(REQUEST_S)
    queue_time: Histogram = _histogram(REQUEST_S)
    prefill_time: Histogram = _histogram(REQUEST_S)
    decode_time: Histogram = _histogram(REQUEST_S)
    inference_time: Histogram = _histogram(REQUEST_S)
    prompt_tokens: Histogram = _histogram(TOKENS)
    generation_tokens: Histogram = _histogram(TOKENS)
    params_n: Histogram = _histogram(CHOICES)
    params_max_tokens: Histogram = _histogram(TOKENS)
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    cached_tokens: int = 0
    in_flight: int = 0


class Exposition:
    """Turns the figures of the moment into Prometheus text. A custom collector: nothing is counted twice."""

    def __init__(
        self,
        telemetry: Telemetry,
        stats: Callable[[], EngineStats],
        report: EngineReport,
        model_name: str,
        max_loras: int = 0,
        vllm_names: bool = True,
    ) -> None:
        self._telemetry = telemetry
        self._stats = stats
        self._report = report
        self._labels = {"model_name": model_name, "engine": "0"}
        self._max_loras = max_loras
        self._vllm_names = vllm_names
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for prefix in ("tandem:", "vllm:") if self._vllm_names else ("tandem:",):
            yield from self._gauges(prefix, stats)
            yield from self._counters(prefix, stats)
            yield from self._histograms(prefix, stats)
        yield from self._own(stats)

    def _gauge(self, name: str, about: str, value: float, **labels: str) -> Metric:
        labels = self._labels | labels
        metric = GaugeMetricFamily(name, about, labels=list(labels))
        metric.add_metric(list(labels.values()), value)
        return metric

    def _counter(self, name: str, about: str, value: float) -> Metric:
        metric = CounterMetricFamily(name, about, labels=list(self._labels))
        metric.add_metric(list(self._labels.values()), value)
        return metric

    def _gauges(self, prefix: str, stats: EngineStats) -> Iterator[Metric]:
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        yield self._gauge(f"{prefix}num_requests_running", "Sequences in the running batch.", stats.num_running)
        yield self._gauge(f"{prefix}num_requests_waiting", "Requests waiting to be run.", stats.num_waiting)
        yield self._gauge(f"{prefix}kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", usage)
        yield self._gauge(
            f"{prefix}lora_requests_info",
            "Adapters of running and waiting requests; the value is the time of reading.",
            time.time(),
            max_lora=str(self._max_loras),
            running_lora_adapters=",".join(stats.running_adapters),
            waiting_lora_adapters=",".join(stats.waiting_adapters),
        )
        yield self._gauge(
            f"{prefix}cache_config_info",
            "How the KV cache is laid out; always 1.",
            1.0,
            block_size=str(self._report.block_size),
            num_gpu_blocks=str(self._report.num_blocks),
        )

    def _counters(self, prefix: str, stats: EngineStats) -> Iterator[Metric]:
        seen = self._telemetry
        yield self._counter(f"{prefix}prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield self._counter(f"{prefix}generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter(f"{prefix}num_preemptions", "Sequences that lost their blocks.", stats.preemptions)
        yield self._counter(f"{prefix}prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries)
        yield self._counter(f"{prefix}prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hits)
        yield self._counter(f"{prefix}prompt_tokens_cached", "Prompt tokens not computed again.", seen.cached_tokens)
        labels = [*self._labels, "finished_reason"]
        success = CounterMetricFamily(f"{prefix}request_success", "Finished choices by reason.", labels=labels)
        for reason, count in seen.finished.items():
            success.add_metric([*self._labels.values(), reason], count)
        yield success

    def _histograms(self, prefix: str, stats: EngineStats) -> Iterator[Metric]:
        seen = self._telemetry
        for name, histogram in {
            "time_to_first_token_seconds": seen.time_to_first_token,
            "inter_token_latency_seconds": seen.inter_token_latency,
            "request_time_per_output_token_seconds": seen.time_per_output_token,
            "e2e_request_latency_seconds": seen.e2e_latency,
            "request_queue_time_seconds": seen.queue_time,
            "request_prefill_time_seconds": seen.prefill_time,
            "request_decode_time_seconds": seen.decode_time,
            "request_inference_time_seconds": seen.inference_time,
            "request_prompt_tokens": seen.prompt_tokens,
            "request_generation_tokens": seen.generation_tokens,
            "request_params_n": seen.params_n,
            "request_params_max_tokens": seen.params_max_tokens,
        }.items():
            yield self._distribution(prefix + name, list(histogram.cumulative()), histogram.total)
        # The engine reports sums, not a distribution, so this one has only its outermost bucket.
        yield self._distribution(f"{prefix}iteration_tokens_total", [("+Inf", stats.steps)], stats.step_tokens)

    def _distribution(self, name: str, buckets: list[tuple[str, float]], total: float) -> Metric:
        metric = HistogramMetricFamily(name, name.partition(":")[2].replace("_", " "), labels=list(self._labels))
        metric.add_metric(list(self._labels.values()), buckets, total)
        return metric

    def _own(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._counter("tandem:steps", "Engine steps.", stats.steps)
        yield self._counter("tandem:step_seconds", "Seconds spent in engine steps.", stats.step_s)
        yield self._gauge("tandem:predicted_wait_seconds", "Predicted wait of a new request.", stats.predicted_wait_s)
        yield self._gauge("tandem:requests_in_flight", "HTTP requests being answered.", self._telemetry.in_flight)
        yield self._gauge("tandem:slo_tpot_seconds", "Target of the time per output token.", self._report.slo_tpot_s)
        yield self._gauge("tandem:slo_ttft_seconds", "Target of the time to first token.", self._report.slo_ttft_s)
        yield self._gauge("tandem:training_runs", "Open training runs.", stats.num_runs)
        yield self._gauge("tandem:training_runs_spilled", "Open training runs not in memory.", stats.num_spilled)
        yield self._gauge(
            "tandem:training_run_bytes", "Memory of open training runs' state, in bytes.", stats.run_bytes
        )
        yield self._counter("tandem:training_tokens", "Tokens trained on.", stats.train_tokens)
        yield self._counter("tandem:training_seconds", "Seconds spent in training slices.", stats.train_s)
