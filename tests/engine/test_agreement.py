"""What the sampler says a token's log-probability is, a training pass over the same tokens says too: for every
instruction set that this machine runs, in float32 and bfloat16, whatever shared the steps that sampled."""

from __future__ import annotations

import finetune_oracle as oracle
import pytest

from tandem.ops.cpu import library
from tandem.work import Example, LoraConfig, OptimParams, Request, SamplingParams

ISAS = ["torch", *library.available()[0]]
LORA = LoraConfig(rank=4, alpha=8.0, seed=3)
ADAM = OptimParams(learning_rate=2e-2)
PROMPTS = [[5, 6, 7, 8], list(range(10, 29)), [9, 8, 7]]
SAME = 1e-5
# torch's products round a row otherwise in a batch of another size, which in bfloat16 shows; compiled ones do not.
ROUNDING = 0.1


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return oracle.gentle_models(tmp_path_factory.mktemp("models"))


def sampled(engine) -> list[tuple[list[int], list[float]]]:
    """(prompt and what was drawn, log-probabilities of what was drawn), some chunked, some together, some alone."""
    sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=1, n=2, logprobs=0, ignore_eos=True)
    found: dict[tuple[str, int], tuple[list[int], list[float]]] = {}
    steps = []
    for i, prompt in enumerate(PROMPTS):
        engine.submit(Request(request_id=str(i), prompt=prompt, sampling=sampling, adapter="policy"))
        steps.append(engine.step())
    for events in [*steps, *engine.run()]:
        for event in events:
            tokens, logprobs = found.setdefault((event.request_id, event.index), ([], []))
            if event.token_id is not None:
                tokens.append(event.token_id)
                logprobs.append(event.logprob.logprob)
    return [([*PROMPTS[int(name)], *tokens], logprobs) for (name, _), (tokens, logprobs) in found.items()]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_and_training_agree(make_engine, dtype, isa, family):
    engine = make_engine(family, dtype=dtype, cpu_isa=isa, max_num_seqs=8, max_num_batched_tokens=16)
    engine.open_run("r", LORA)
    for _ in range(3):
        engine.forward_backward("r", oracle.examples(0, [9, 12]))
        engine.optim_step("r", ADAM)
    engine.publish("r", "policy")
    drawn = sampled(engine)
    assert len(drawn) == 6 and all(len(logprobs) == 12 for _, logprobs in drawn)
    batch = [Example(ids[:-1], ids[1:], [1.0] * (len(ids) - 1)) for ids, _ in drawn]
    report = engine.forward("r", batch, wants_logprobs=True)
    apart = [
        abs(one - other)
        for (_, logprobs), trained in zip(drawn, report.logprobs, strict=True)
        for one, other in zip(logprobs, trained[-12:], strict=True)
    ]
    assert max(apart) < (ROUNDING if (dtype, isa) == ("bfloat16", "torch") else SAME)
    engine.unload_adapter("policy")
    engine.close_run("r")
