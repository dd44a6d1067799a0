"""Runs tinker_cookbook's sl_loop and rl_loop, as they are on PyPI, against a running server.

    tandem serve --demo --served-model-name Qwen/Qwen3-8B-Base
    python tools/tinker_recipes.py sl        # or rl
    python tools/tinker_recipes.py rl --loss-fn cispo

The recipes' code is untouched. What they fetch from elsewhere is given to them here, and nothing else:
- `datasets.load_dataset` gives a few rows made up here, in the same columns;
- `AutoTokenizer.from_pretrained` loads the served model's tokenizer under the name the recipes know;
- `rl_loop.get_reward` (rl only): a small model boxes no answers, so the reward is whether a reply is longer than most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAME = "Qwen/Qwen3-8B-Base"  # one whose renderer needs no special tokens


def rows(kind: str) -> list[dict[str, Any]]:
    if kind == "rl":
        return [{"question": f"What is {i} plus {i + 2}?", "answer": f"It is #### {2 * i + 2}"} for i in range(16)]
    talk = [("What is your name?", "My name is Tandem."), ("Where do you live?", "In this test.")] * 8
    return [{"messages": [{"role": "user", "content": f"{i}. {ask}"}, {"role": "assistant", "content": reply}]}
            for i, (ask, reply) in enumerate(talk)]  # fmt: skip


def stand_in(kind: str, tokenizer: str) -> None:
    """Replace what the recipes fetch."""
    import datasets
    from transformers import AutoTokenizer

    local = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows(kind))})
    datasets.load_dataset = lambda *_, **__: local
    load = AutoTokenizer.from_pretrained
    AutoTokenizer.from_pretrained = staticmethod(lambda name, *_, **__: load(tokenizer))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sl", "rl"))
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", default=str(ROOT / "tandem" / "assets" / "demo"), help="its directory")
    parser.add_argument("--loss-fn", default="importance_sampling", help="of rl_loop")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    stand_in(options.kind, options.tokenizer)
    shared = {
        "base_url": options.base_url, "model_name": NAME, "log_path": tempfile.mkdtemp(), "batch_size": 4,
        "lora_rank": 8, "max_steps": options.steps, "save_every": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    if options.kind == "sl":
        from tinker_cookbook.recipes import sl_loop

        sl_loop.main(sl_loop.Config(**shared, max_length=512))
    else:
        from tinker_cookbook.recipes import rl_loop

        rl_loop.get_reward = lambda response, answer: float(len(response) > 40)
        rl_loop.main(rl_loop.Config(**shared, group_size=8, max_tokens=16, loss_fn=options.loss_fn))
    print((Path(shared["log_path"]) / "metrics.jsonl").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
