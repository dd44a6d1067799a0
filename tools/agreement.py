"""How far the log-probabilities of sampling and of training are apart, for each instruction set and dtype: per token of
samples drawn at temperature 1 from an adapter that was trained a little, the largest and the mean difference, and the
mean of an estimate of KL(sampler, trainer). Beside them what PEFT on transformers says of the same tokens, which is
where a loop stands whose sampler and trainer are two programs.

    python tools/agreement.py --out docs/agreement.json --plot docs/agreement.png

The estimate is r - 1 - log r with r = p_trainer / p_sampler (Schulman 2020), which is never negative.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tandem.config import DEMO_MODEL, CacheConfig, EngineConfig, ModelConfig
from tandem.engine.engine import Engine
from tandem.ops.cpu import library
from tandem.tokenizer import Tokenizer
from tandem.work import Example, LoraConfig, OptimParams, Request, SamplingParams

UPDATES = 5
LORA = LoraConfig(rank=8, alpha=32.0)


def example(tokens: list[int]) -> Example:
    return Example(tokens[:-1], tokens[1:], [1.0] * (len(tokens) - 1))


def draw(engine: Engine, prompt: list[int], samples: int, length: int) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens, and the sampler's log-probabilities of them."""
    sampling = SamplingParams(max_tokens=length, temperature=1.0, seed=0, n=samples, logprobs=0, ignore_eos=True)
    engine.submit(Request(request_id="drawn", prompt=prompt, sampling=sampling, adapter="policy"))
    tokens: list[list[int]] = [[] for _ in range(samples)]
    logprobs: list[list[float]] = [[] for _ in range(samples)]
    for events in engine.run():
        for event in events:
            if event.token_id is not None and event.logprob is not None:
                tokens[event.index].append(event.token_id)
                logprobs[event.index].append(event.logprob.logprob)
    return tokens, logprobs


def elsewhere(path: str, dtype: str, adapter: Path, sequences: list[list[int]]) -> np.ndarray:
    """What transformers and PEFT say of every token but the first of each sequence."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), str(adapter)).eval()
    ids = torch.tensor(sequences)
    with torch.no_grad():
        logprobs = model(ids).logits.float().log_softmax(-1)[:, :-1]
    return logprobs.gather(2, ids[:, 1:, None])[:, :, 0].double().numpy()


def apart(trained: np.ndarray, sampled: np.ndarray) -> dict[str, float]:
    difference = trained - sampled
    return {
        "largest": float(np.abs(difference).max()), "mean": float(np.abs(difference).mean()),
        "kl": float(np.mean(np.expm1(difference) - difference)),
    }  # fmt: skip


def measured(path: str, dtype: str, isa: str, options: argparse.Namespace) -> dict[str, Any]:
    """One engine: an adapter after some updates, samples of it, a training pass over them."""
    model = ModelConfig(model=path, dtype=dtype, cpu_isa=isa, num_threads=options.threads)
    engine = Engine(EngineConfig(model=model, cache=CacheConfig(num_blocks=1024)))
    engine.open_run("run", LORA)
    prompt = Tokenizer.load(path).render([{"role": "user", "content": "What can you tell me about the towns here?"}])
    for _ in range(UPDATES):
        engine.forward_backward("run", [example(prompt)])
        engine.optim_step("run", OptimParams(learning_rate=1e-3))
    engine.publish("run", "policy")
    tokens, logprobs = draw(engine, prompt, options.samples, options.tokens)
    sampled = np.asarray(logprobs, np.float64)
    passed = engine.forward("run", [example(prompt + drawn) for drawn in tokens], wants_logprobs=True)
    trained = np.asarray(passed.logprobs, np.float64)[:, len(prompt) - 1 :]
    row: dict[str, Any] = {"dtype": dtype, "isa": isa, "tokens": sampled.size, **apart(trained, sampled)}
    with tempfile.TemporaryDirectory() as folder:
        engine.save_run("run", Path(folder) / "adapter")
        others = elsewhere(path, dtype, Path(folder) / "adapter", [prompt + drawn for drawn in tokens])
    row["elsewhere"] = apart(others[:, len(prompt) - 1 :], sampled)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharex=True)
    names = [f"{row['dtype']}\n{row['isa']}" for row in rows]
    for axis, key, title in zip(
        axes, ("kl", "largest"), ("KL(sampler, trainer), per token", "largest difference of a log-probability"),
        strict=True,
    ):  # fmt: skip
        for values, name, marker in (
            ([row[key] for row in rows], "Tandem's training pass", "o"),
            ([row["elsewhere"][key] for row in rows], "transformers and PEFT", "x"),
        ):
            axis.plot(names, values, marker, label=name)
        axis.set_yscale("symlog", linthresh={"kl": 1e-15, "largest": 1e-7}[key])
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=6)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=7, loc="center left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args()
    rows = []
    for dtype in ("float32", "bfloat16"):
        for isa in ("torch", *reversed(library.available()[0])):
            row = measured(options.model, dtype, isa, options)
            rows.append(row)
            for name, found in (("trainer", row), ("PEFT", row["elsewhere"])):
                print(f"{dtype:8} {isa:6} {name:7} {row['tokens']} tokens: largest difference {found['largest']:.1e}, "
                      f"mean {found['mean']:.1e}, KL {found['kl']:.1e}", flush=True)  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
