"""What users type is frozen here: commands, flags, names. A change to this file is a change for them."""

import importlib

import pytest

from tandem.__main__ import VERBS

ENGINE_FLAGS = """
    --tokenizer --revision --dtype --device --max-model-len --num-threads --seed --block-size --kv-cache-memory-bytes
    --num-blocks --gpu-memory-utilization --enable-prefix-caching --max-num-seqs --max-num-batched-tokens
    --max-num-queued-reqs --max-wait-s --lora-modules --max-loras --max-lora-rank --max-cpu-loras --lora-root
"""
FLAGS = {
    "serve": f"""
        --model --demo --config {ENGINE_FLAGS} --host --port --api-key --served-model-name --chat-template --root-path
        --allowed-origins --max-body-bytes --vllm-metrics --uvicorn-log-level --disable-log-stats
        --trust-request-chat-template""",
    "chat": "--quick --url --api-key --model-name --system-prompt --max-tokens --temperature",
    "complete": "--quick --url --api-key --model-name --max-tokens --temperature",
    "bench throughput": f"--model --demo --config --workloads --repeat --json --roofline {ENGINE_FLAGS}",
    "bench serve": """
        --base-url --endpoint --model --api-key --dataset-name --dataset-path --num-prompts --request-rate
        --max-concurrency --random-input-len --random-output-len --random-range-ratio --vocab-size --trace-scale
        --trace-speed --ignore-eos --temperature --seed --long-prompt-at --long-prompt-len --goodput
        --percentile-metrics --save-result --result-filename --plot""",
    "doctor": "--skip-model --host --port",
    "version": "",
}


def flags_of(verb):
    parser = importlib.import_module(f"tandem.cli.{VERBS[verb][0]}").parser(f"tandem {verb}")
    return {name for name in parser._option_string_actions if name.startswith("--") and not name.startswith("--no-")}


def test_commands():
    assert list(VERBS) == [
        "serve", "chat", "complete", "bench throughput", "bench serve", "doctor", "version",
    ]  # fmt: skip


@pytest.mark.parametrize("verb", FLAGS)
def test_flags(verb):
    assert flags_of(verb) - {"--help"} == set(FLAGS[verb].split())
