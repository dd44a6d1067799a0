"""One command for everything: `python -m tools.demo_model.build --out tandem/assets/demo`.

Trains the tokenizer and the model, saves them, evaluates the saved files and writes results.json next to this file.
"""

import argparse
import dataclasses
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import torch

from tools.demo_model import corpus, evaluate, tokens, train, world

TOKENIZER_SEED = 1
RESULTS = Path(__file__).with_name("results.json")


def publish(source: Path, target: Path) -> None:
    """Moves each file in place whole, so that nobody ever reads half of one."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        partial = target / f".{file.name}.partial"
        shutil.copyfile(file, partial)
        partial.replace(target / file.name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the evaluation is written")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the training tokens, below 1 for a trial")
    parser.add_argument("--start", type=Path, help="a folder made by the first cycle: only the second is trained")
    parser.add_argument("--count", type=int, default=evaluate.NUM_PER_CLASS, help="questions per class")
    parser.add_argument("--checkpoints", type=Path, help="folder for a copy of the unfinished model every 300 steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    the_world = world.build_world()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        tokens.save_tokenizer(tokens.train_tokenizer(the_world, TOKENIZER_SEED), made)
        tokens.verify(made, list(islice(corpus.documents(the_world, TOKENIZER_SEED), 300)))
        cycles = [train.FIRST, train.SECOND]
        if args.start:
            shutil.copyfile(args.start / "config.json", made / "config.json")
            shutil.copyfile(args.start / "model.safetensors", made / "model.safetensors")
            cycles = [train.SECOND]
        runs = []
        for recipe in cycles:
            scaled = dataclasses.replace(recipe, tokens=int(recipe.tokens * args.scale))
            model, run = train.train(the_world, made, scaled, args.checkpoints)
            train.save(model, made)
            runs.append({**run, "recipe": dataclasses.asdict(scaled)})
        results = evaluate.evaluate(the_world, made, args.count)
        publish(made, args.out)
    evaluate.write_json(args.results, {"cycles": runs, **results})


if __name__ == "__main__":
    main()
