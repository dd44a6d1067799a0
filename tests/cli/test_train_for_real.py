"""`tandem train` alone with its real engine: what it leaves is read by PEFT, merges for transformers, and is served."""

import json
from pathlib import Path

import tiny_adapters
import tiny_models
import torch
from safetensors.torch import load_file

from tandem.__main__ import main
from tandem.config import CacheConfig, EngineConfig, ModelConfig
from tandem.engine.engine import Engine
from tandem.work import Request, SamplingParams

PROMPT = tiny_models.tokenizer().encode("The sea is")
NUM_TOKENS = 12


def served(model, adapter):
    """Greedy tokens of our engine."""
    options = ModelConfig(model=str(model), dtype="float32", num_threads=1)
    engine = Engine(EngineConfig(options, CacheConfig(num_blocks=64)))
    engine.load_adapter("mine", str(adapter))
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    engine.submit(Request(request_id="r", prompt=PROMPT, sampling=sampling, adapter="mine"))
    return [event.token_id for events in engine.run() for event in events if event.token_id is not None]


def test_peft_transformers_and_our_engine_agree_on_what_was_trained(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("phi3")
    rows = [{"prompt": "The sea is", "completion": " blue."}, {"prompt": "The fire is", "completion": " red."}] * 4
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--model", str(model), "--data", "rows.jsonl", "--batch-size", "8", "--dtype", "float32"]
    argv += ["--num-threads", "1", "--num-blocks", "64", "--output"]
    assert main([*argv, "out", "--epochs", "8", "--learning-rate", "3e-3", "--rank", "4"]) == 0
    losses = [
        float(line.split("loss=")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines() if "loss=" in line
    ]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0]

    output = tmp_path / "out"
    assert all(tensor.dtype == torch.float32 for tensor in load_file(output / "adapter_model.safetensors").values())
    peft = tiny_adapters.logprobs(model, output, PROMPT)
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        base = tiny_models.oracle(model)(input_ids=ids).logits[0].log_softmax(-1)
        assert main(["adapters", "merge", "out", "--output", "merged"]) == 0
        merged = tiny_models.oracle(tmp_path / "merged")(input_ids=ids).logits[0].log_softmax(-1)
    assert (peft - base).abs().max() > 0.1
    torch.testing.assert_close(merged, peft, rtol=0, atol=1e-5 * peft.abs().max().item())
    assert served(model, output) == tiny_adapters.generate(model, output, PROMPT, NUM_TOKENS)

    # Going on from it begins where it ended: every step is of all rows.
    assert main([*argv, "more", "--epochs", "1", "--init-from", "out"]) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if "Step 1/" in line)
    assert float(first.split("loss=")[1].split(",")[0]) <= losses[-1] + 0.01
