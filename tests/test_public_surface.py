"""What users type is frozen here: commands, flags, names. A change to this file is a change for them."""

import importlib

import pytest

from tandem.__main__ import VERBS

ENGINE_FLAGS = """
    --tokenizer --revision --dtype --device --max-model-len --num-threads --seed --block-size --kv-cache-memory-bytes
    --num-blocks --gpu-memory-utilization --enable-prefix-caching --max-num-seqs --max-num-batched-tokens
    --max-num-queued-reqs --max-wait-s --lora-modules --max-loras --max-lora-rank --max-cpu-loras --lora-root
    --slo-tpot-ms --slo-ttft-ms --train-step-ms --train-memory-bytes --train-batch-tokens --train-window
    --share-forward --share-prefixes --deterministic --quantization --cpu-isa --kv-cache-dtype --train-resident-bytes
    --max-resident-runs --train-spill-dir --autotune
"""
SERVER = "--server --api-key"
FLAGS = {
    "serve": f"""
        --model --demo --config {ENGINE_FLAGS} --host --port --api-key --served-model-name --chat-template --root-path
        --allowed-origins --max-body-bytes --vllm-metrics --uvicorn-log-level --disable-log-stats
        --trust-request-chat-template --state-dir --database-url --organization --max-running-jobs
        --max-file-bytes --grader-hosts""",
    "chat": "--quick --url --api-key --model-name --system-prompt --max-tokens --temperature",
    "complete": "--quick --url --api-key --model-name --max-tokens --temperature",
    "train": f"""
        {SERVER} --data --validation --model --output --init-from --suffix --detach --epochs --batch-size
        --method --grader --beta --group-size --max-tokens --loss
        --learning-rate --rank --alpha --target-modules --use-rslora --dropout --max-seq-len --schedule --warmup-steps
        --weight-decay --max-grad-norm --priority --checkpoint-every --validate-every --format --seed
        --tokenizer --revision --dtype --device --max-model-len --num-threads --chat-template --block-size
        --kv-cache-memory-bytes --num-blocks --gpu-memory-utilization --train-memory-bytes --train-batch-tokens
        --train-window --share-prefixes --deterministic --quantization --cpu-isa --kv-cache-dtype --autotune
        --optimizer""",
    "jobs ls": f"{SERVER} --json --limit",
    "jobs show": f"{SERVER} --json",
    "jobs logs": f"{SERVER} --follow",
    "jobs pause": SERVER,
    "jobs resume": SERVER,
    "jobs cancel": SERVER,
    "adapters ls": f"{SERVER} --json",
    "adapters load": SERVER,
    "adapters unload": SERVER,
    "adapters export": SERVER,
    "adapters merge": f"{SERVER} --model --output --revision",
    "adapters promote": SERVER,
    "adapters rollback": SERVER,
    "adapters rm": SERVER,
    "data check": "--model --tokenizer --chat-template --format --max-seq-len",
    "bench throughput": f"--model --demo --config --workloads --repeat --json --roofline {ENGINE_FLAGS}",
    "bench serve": """
        --base-url --endpoint --model --api-key --dataset-name --dataset-path --num-prompts --request-rate
        --max-concurrency --random-input-len --random-output-len --random-range-ratio --vocab-size --trace-scale
        --trace-speed --ignore-eos --temperature --seed --long-prompt-at --long-prompt-len --goodput
        --percentile-metrics --save-result --result-filename --plot""",
    "bench coserve": """
        --model --demo --config --trace --trace-scale --loads --modes --seconds --warm-up-seconds --capacity
        --search-seconds --search-steps --target-ttft-ms --target-tpot-ms --train-batch --train-length --train-rank
        --closed-streams --json --plot --vllm-python --peft-python --peft-tokens-per-s --tokenizer --revision --dtype
        --device --max-model-len --num-threads --seed --block-size --kv-cache-memory-bytes --num-blocks
        --gpu-memory-utilization --max-num-seqs --max-num-batched-tokens --max-num-queued-reqs --max-wait-s
        --lora-modules --max-loras --max-lora-rank --max-cpu-loras --lora-root --slo-tpot-ms --train-step-ms
        --train-memory-bytes --train-batch-tokens --train-window --share-prefixes --deterministic
        --quantization --cpu-isa --kv-cache-dtype --autotune""",
    "bench memory": "--model --demo --length --window --rank --json --revision --dtype",
    "doctor": "--skip-model --host --port",
    "version": "",
}


def flags_of(verb):
    parser = importlib.import_module(f"tandem.cli.{VERBS[verb][0]}").parser(f"tandem {verb}")
    return {name for name in parser._option_string_actions if name.startswith("--") and not name.startswith("--no-")}


def test_commands():
    assert list(VERBS) == list(FLAGS)


@pytest.mark.parametrize("verb", FLAGS)
def test_flags(verb):
    assert flags_of(verb) - {"--help"} == set(FLAGS[verb].split())
