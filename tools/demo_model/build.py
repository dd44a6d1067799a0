"""One command for everything: `python -m tools.demo_model.build --out tandem/assets/demo`.

Trains the tokenizer and the model, saves them, evaluates the saved files and writes results.json next to this file.
"""

import argparse
import dataclasses
import shutil
import tempfile
from pathlib import Path

import torch

from tools.demo_model import evaluate, tokens, train, world

RESULTS = Path(__file__).with_name("results.json")


def publish(source: Path, target: Path) -> None:
    """Moves each file in place whole, so that nobody ever reads half of one."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        partial = target / f".{file.name}.partial"
        shutil.copyfile(file, partial)
        partial.replace(target / file.name)


def parse() -> argparse.Namespace:
    recipe = train.Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the evaluation is written")
    parser.add_argument("--tokens", type=int, default=recipe.tokens, help="training tokens")
    parser.add_argument("--tokens-per-step", type=int, default=recipe.tokens_per_step)
    parser.add_argument("--peak-lr", type=float, default=recipe.peak_lr)
    parser.add_argument("--count", type=int, default=evaluate.NUM_PER_CLASS, help="questions per class")
    parser.add_argument("--checkpoints", type=Path, help="folder for a copy of the unfinished model every 300 steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    recipe = train.Recipe(tokens=args.tokens, tokens_per_step=args.tokens_per_step, peak_lr=args.peak_lr)
    the_world = world.build_world()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        tokens.train_tokenizer(the_world, recipe.seed).save_pretrained(made, save_jinja_files=False)
        model, run = train.train(the_world, made, recipe, args.checkpoints)
        train.save(model, made)
        results = evaluate.evaluate(the_world, made, args.count)
        publish(made, args.out)
    evaluate.write_json(args.results, {"recipe": dataclasses.asdict(recipe), "training": run, **results})


if __name__ == "__main__":
    main()
