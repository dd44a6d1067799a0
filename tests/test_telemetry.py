"""Histograms against prometheus_client's own, and the frozen list of metric names."""

import random

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from tandem.telemetry import PER_TOKEN_S, Exposition, Histogram, Telemetry
from tandem.work import EngineReport, EngineStats

REPORT = EngineReport(
    model="m", architecture="llama", num_parameters=1, weight_bytes=1, load_s=0, device="cpu", isa="", num_threads=1,
    dtype="float32", block_size=16, num_blocks=64, kv_bytes=1, max_model_len=256, vocab_size=500,
)  # fmt: skip
# What dashboards and gateways written for vLLM ask for.
VLLM_SAMPLES = """
num_requests_running num_requests_waiting kv_cache_usage_perc lora_requests_info cache_config_info
prompt_tokens_total generation_tokens_total request_success_total num_preemptions_total prefix_cache_queries_total
prefix_cache_hits_total prompt_tokens_cached_total
time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket request_time_per_output_token_seconds_bucket
e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket request_prefill_time_seconds_bucket
request_decode_time_seconds_bucket request_inference_time_seconds_bucket request_prompt_tokens_bucket
request_generation_tokens_bucket request_params_n_bucket request_params_max_tokens_bucket
iteration_tokens_total_bucket iteration_tokens_total_sum iteration_tokens_total_count
""".split()
OWN_SAMPLES = ["steps_total", "step_seconds_total", "predicted_wait_seconds", "requests_in_flight"]


def samples(exposition: Exposition) -> dict[str, list]:
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(exposition.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_histogram_equals_prometheus_client():
    ours, registry = Histogram(PER_TOKEN_S), prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("x", "x", buckets=PER_TOKEN_S, registry=registry)
    rng = random.Random(0)
    for value in [*PER_TOKEN_S, 0.0, 1e9, *(rng.expovariate(5) for _ in range(500))]:
        ours.observe(value)
        theirs.observe(value)
    for edge, count in ours.cumulative():
        assert registry.get_sample_value("x_bucket", {"le": edge}) == count
    assert abs(registry.get_sample_value("x_sum") - ours.total) < 1e-3


def test_every_name_is_there_under_both_prefixes():
    found = samples(Exposition(Telemetry(), EngineStats, REPORT, "m"))
    for name in VLLM_SAMPLES:
        for prefix in ("vllm:", "tandem:"):
            assert prefix + name in found, prefix + name
            for sample in found[prefix + name]:
                assert sample.labels["model_name"] == "m" and sample.labels["engine"] == "0"
    assert all(f"tandem:{name}" in found for name in OWN_SAMPLES)
    quiet = samples(Exposition(Telemetry(), EngineStats, REPORT, "m", vllm_names=False))
    assert quiet and not any(name.startswith("vllm:") for name in quiet)


def test_the_figures_of_the_engine():
    stats = EngineStats(
        num_running=2, num_waiting=3, blocks_total=10, blocks_used=4, prompt_tokens=100, generation_tokens=50,
        prefix_queries=64, prefix_hits=32, preemptions=1, steps=7, step_tokens=150, step_s=0.5,
        running_adapters=["a", "b"], waiting_adapters=["c"],
    )  # fmt: skip
    telemetry = Telemetry()
    telemetry.finished["stop"] += 2
    found = samples(Exposition(telemetry, lambda: stats, REPORT, "m", max_loras=32))

    def value(name):
        (sample,) = found[name]
        return sample.value

    assert value("vllm:num_requests_running") == 2 and value("vllm:num_requests_waiting") == 3
    assert value("vllm:kv_cache_usage_perc") == 0.4 and value("vllm:num_preemptions_total") == 1
    assert value("vllm:prompt_tokens_total") == 100 and value("vllm:generation_tokens_total") == 50
    assert value("vllm:iteration_tokens_total_sum") == 150 and value("vllm:iteration_tokens_total_count") == 7
    (info,) = found["vllm:lora_requests_info"]
    assert (info.labels["max_lora"], info.labels["running_lora_adapters"]) == ("32", "a,b") and info.value > 1e9
    assert info.labels["waiting_lora_adapters"] == "c"
    (cache,) = found["vllm:cache_config_info"]
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"]) == ("16", "64")
    reasons = {s.labels["finished_reason"]: s.value for s in found["vllm:request_success_total"]}
    assert reasons == {"stop": 2, "length": 0, "abort": 0, "error": 0}
