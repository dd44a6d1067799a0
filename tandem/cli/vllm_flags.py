"""Flags people know from vLLM that Tandem does not have, each with the reason, or with why it may be passed anyway.

Data only: `options.py` turns a hit into the error or the line. Flags that Tandem has are not listed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignFlag:
    """`harmless`: accepted with a line. `takes_value`: the next word belongs to it (matters only when harmless)."""

    reason: str
    harmless: bool = False
    takes_value: bool = False


_REFUSED = {
    "it runs one model in one engine process over all cores or one GPU; to scale out, run several servers": """
        tensor-parallel-size pipeline-parallel-size data-parallel-size data-parallel-size-local data-parallel-rank
        data-parallel-start-rank data-parallel-address data-parallel-rpc-port data-parallel-backend
        data-parallel-hybrid-lb data-parallel-external-lb decode-context-parallel-size prefill-context-parallel-size
        enable-expert-parallel enable-eplb eplb-config all2all-backend distributed-executor-backend nnodes node-rank
        master-addr master-port max-parallel-loading-workers disable-custom-all-reduce ray-workers-use-nsight
        worker-cls worker-extension-cls headless api-server-count enable-dbo dbo-decode-token-threshold""",
    "every layer's cache has the same --kv-cache-dtype, whose scales are computed as it fills": """
        calculate-kv-scales kv-cache-dtype-skip-layers""",
    "weights and cache stay where --device says; there is no second tier of memory so far": """
        cpu-offload-gb cpu-offload-params kv-offloading-size kv-offloading-backend enable-sleep-mode num-gpu-blocks""",
    "there is no speculative decoding so far": """
        speculative-config speculative-model num-speculative-tokens spec-method spec-tokens""",
    "it serves text models only": """
        limit-mm-per-prompt mm-processor-kwargs media-io-kwargs interleave-mm-strings allowed-local-media-path
        allowed-media-domains mm-processor-cache-gb mm-processor-cache-type disable-mm-preprocessor-cache
        mm-encoder-tp-mode mm-encoder-attn-backend skip-mm-profiling video-pruning-rate enable-mm-embeds
        language-model-only""",
    "it does not parse tool calls or reasoning out of the text so far": """
        tool-call-parser enable-auto-tool-choice tool-parser-plugin tool-server reasoning-parser
        reasoning-parser-plugin exclude-tools-when-tool-choice-none""",
    "there is no constrained decoding so far": """
        structured-outputs-config guided-decoding-backend guided-decoding-disable-fallback logits-processors
        logits-processor-pattern""",
    "code that comes with a model is never run; convert the model to a supported architecture": """
        trust-remote-code""",
    "it generates text; pooling, embedding and scoring models are not served": """
        runner convert task pooler-config override-pooler-config""",
    "weights are read from safetensors or GGUF in a directory or the hub's cache (HF_HOME, HF_TOKEN and HF_HUB_OFFLINE "
    "are honoured)": """
        load-format model-loader-extra-config download-dir ignore-patterns hf-token safetensors-load-strategy
        pt-load-map-location""",
    "the model directory's own files decide; edit config.json or generation_config.json instead": """
        config-format hf-overrides hf-config-path model-impl rope-scaling rope-theta generation-config
        override-generation-config logprobs-mode max-logprobs tokenizer-mode tokenizer-revision code-revision
        skip-tokenizer-init disable-sliding-window disable-cascade-attn chat-template-content-format response-role
        default-chat-template-kwargs""",
    "it does not speak TLS; put a proxy such as nginx or caddy before it": """
        ssl-keyfile ssl-certfile ssl-ca-certs ssl-cert-reqs ssl-ciphers enable-ssl-refresh uds""",
    "keys and values are not handed from one server to another so far": """
        kv-transfer-config kv-events-config kv-connector kv-role ec-transfer-config kv-sharing-fast-prefill""",
    "kernels are chosen once at start and printed; there is nothing to compile or capture": """
        compilation-config optimization-level cuda-graph-sizes cudagraph-capture-sizes max-cudagraph-capture-size
        attention-backend attention-config kernel-config moe-backend linear-backend additional-config
        enable-flashinfer-autotune""",
    "the cost model cuts prompts so that running streams keep their pace; there are no knobs for it": """
        max-num-partial-prefills max-long-partial-prefills long-prefill-token-threshold no-enable-chunked-prefill
        num-scheduler-steps num-lookahead-slots scheduler-delay-factor preemption-mode scheduler-cls
        disable-hybrid-kv-cache-manager stream-interval""",
    "requests are served in order of arrival so far": """
        scheduling-policy""",
    "adapters may have any rank and any of the supported modules, and are never sharded": """
        lora-extra-vocab-size long-lora-scaling-factors fully-sharded-loras lora-dtype default-mm-loras
        enable-lora-bias enable-prompt-adapter lora-target-modules""",
    "prefixes are matched by their tokens, not by a hash": """
        prefix-caching-hash-algo""",
    "metrics are at /metrics and nothing is sent anywhere": """
        otlp-traces-endpoint collect-detailed-traces show-hidden-metrics-for-version kv-cache-metrics
        kv-cache-metrics-sample enable-mfu-metrics enable-layerwise-nvtx-tracing profiler-config
        enable-server-load-tracking""",
    "it runs no code of its user's inside the server; put a proxy before it": """
        middleware""",
    "CORS answers allow every method and header for the origins of --allowed-origins": """
        allow-credentials allowed-methods allowed-headers""",
    "logging is set with --uvicorn-log-level and --disable-log-stats": """
        log-config-file max-log-len enable-log-requests enable-log-outputs enable-log-deltas aggregate-engine-logging
        access-log-config disable-access-log-for-endpoints enable-log-error-stack""",
    "the option exists in vLLM only": """
        enable-tokenizer-info-endpoint return-tokens-as-token-ids enable-force-include-usage disable-fastapi-docs
        enable-offline-docs h11-max-incomplete-event-size h11-max-header-count shutdown-timeout""",
}

_HARMLESS = {
    "adapters are always enabled": ("enable-lora",),
    "long prompts are always prefilled in chunks": ("enable-chunked-prefill",),
    "requests are not logged": ("disable-log-requests", "no-enable-log-requests", "disable-uvicorn-access-log"),
    "nothing is compiled or captured": ("enforce-eager", "use-v2-block-manager"),
    "the engine is its own process already": ("async-scheduling", "no-async-scheduling"),
    "usage always says how many prompt tokens were cached": ("enable-prompt-tokens-details",),
    "replies always carry x-request-id": ("enable-request-id-headers",),
    "nothing is sent anywhere": ("disable-log-telemetry",),
    "the engine's size follows --max-model-len": ("max-seq-len-to-capture=",),
    "preempted requests are computed again, never swapped": ("swap-space=",),
}

_SHORT = {"-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size", "-dp": "data-parallel-size",
          "-dcp": "decode-context-parallel-size", "-O": "optimization-level",
          "-cc": "compilation-config", "-sc": "speculative-config"}  # fmt: skip

FLAGS: dict[str, ForeignFlag] = {
    **{name: ForeignFlag(reason) for reason, names in _REFUSED.items() for name in names.split()},
    **{
        name.rstrip("="): ForeignFlag(reason, harmless=True, takes_value=name.endswith("="))
        for reason, names in _HARMLESS.items()
        for name in names
    },
}


def lookup(flag: str) -> ForeignFlag | None:
    """What is known of a flag such as --tensor-parallel-size, --no-enforce-eager or -tp; None if vLLM has none such."""
    name = _SHORT.get(flag, flag.removeprefix("--"))
    return FLAGS.get(name) or FLAGS.get(name.removeprefix("no-"))
