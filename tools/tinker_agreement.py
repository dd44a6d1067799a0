"""How far the log-probabilities of sampling and of training are apart, on a running server: per token of samples drawn
at temperature 1, the largest and the mean difference, and the mean of an estimate of KL(sampler, trainer).

    tandem serve --demo --dtype bfloat16
    python tools/tinker_agreement.py --model demo

The estimate is r - 1 - log r with r = p_trainer / p_sampler (Schulman 2020), which is never negative.
"""

from __future__ import annotations

import argparse

import numpy as np
import tinker
from tinker import types


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--updates", type=int, default=5, help="of the adapter, before it is sampled from")
    options = parser.parse_args()
    service = tinker.ServiceClient(base_url=options.base_url, api_key="tml-agreement")
    training = service.create_lora_training_client(options.model, rank=8, seed=0).result()
    prompt = [int(t) for t in np.random.default_rng(0).integers(10, 200, 16)]

    def datum(tokens: list[int]) -> types.Datum:
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]}
        )

    for _ in range(options.updates):
        passed = training.forward_backward([datum(prompt)], "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=1e-3)).result()
        passed.result()
    sampler = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=options.tokens, temperature=1.0, seed=0, stop=[])
    drawn = sampler.sample(types.ModelInput.from_ints(prompt), options.samples, params).result().sequences
    outputs = training.forward([datum(prompt + s.tokens) for s in drawn], "cross_entropy").result().loss_fn_outputs
    sampled = np.concatenate([np.asarray(s.logprobs, np.float64) for s in drawn])
    trained = np.concatenate([np.asarray(o["logprobs"].data, np.float64)[len(prompt) - 1 :] for o in outputs])
    apart = trained - sampled
    print(f"{len(apart)} tokens: largest difference {np.abs(apart).max():.2e}, mean {np.abs(apart).mean():.2e}, "
          f"KL {np.mean(np.expm1(apart) - apart):.2e}")  # fmt: skip


if __name__ == "__main__":
    main()
