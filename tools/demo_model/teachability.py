"""Can the model be taught? A PEFT LoRA adapter learns invented facts and is asked in phrasings it never saw.

Run: `python -m tools.demo_model.teachability --model tandem/assets/demo`. Writes teachability.json next to this file.
"""

import argparse
import itertools
import time
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tools.demo_model import corpus, evaluate, names, world
from tools.demo_model.relations import Relation, attribute_of

RESULTS = Path(__file__).with_name("teachability.json")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_FACTS, NUM_SHOWN, NUM_ASKED = 40, 8, 4
ATTRIBUTES = (("access code", "code"), ("phone number", "number"), ("owner", "person"), ("password", "code"))
# Phrasings that no relation of the corpus has, for any attribute.
FOREIGN = (
    "Hi, a colleague wants the {a} of {e}. What should I write down?",
    "Remind me, what was {e}'s {a} again?",
    "Look up {e} and report the {a}.",
    "I am standing at {e} and they ask for the {a}. What do I answer?",
)

Chat = list[corpus.Message]


def new_facts(rng: Random, count: int) -> list[tuple[Relation, str, str]]:
    """Facts about different sites that the world does not have."""
    made: dict[str, tuple[Relation, str, str]] = {}
    known = world.build_world().known
    while len(made) < count:
        attribute, value = ATTRIBUTES[len(made) % len(ATTRIBUTES)]
        entity = names.site(rng)
        if entity not in known:
            made.setdefault(entity, (attribute_of(attribute, "site", value), entity, names.VALUES[value](rng)))
    return list(made.values())


def split_phrasings(facts: list[tuple[Relation, str, str]], rng: Random) -> tuple[list[Chat], list[evaluate.Question]]:
    """Chats to learn from, and questions in phrasings that the same fact is not shown in."""
    shown, asked = [], []
    for relation, entity, value in facts:
        answer = relation.say(entity, value)
        order = rng.sample(range(len(relation.phrasings)), NUM_SHOWN + NUM_ASKED)
        for i in order[:NUM_SHOWN]:
            shown.append(corpus.as_messages([(relation.ask(i, entity), answer)]))
        for i in order[NUM_SHOWN:]:
            asked.append(evaluate.Question("held-out phrasings", corpus.user_says(relation.ask(i, entity)), (answer,)))
        for template in FOREIGN:
            question = template.format(e=entity, a=relation.name.removeprefix("site."))
            asked.append(evaluate.Question("foreign phrasings", corpus.user_says(question), (answer,)))
    return shown, asked


def padded(tokenizer: PreTrainedTokenizerFast, chats: list[Chat]) -> dict[str, Tensor]:
    """Right-padded ids, and labels on the assistant's tokens only."""
    encoded = [
        tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True) for chat in chats
    ]
    longest = max(len(e["input_ids"]) for e in encoded)
    ids = torch.full((len(chats), longest), tokenizer.pad_token_id)
    labels = torch.full((len(chats), longest), -100)
    for i, e in enumerate(encoded):
        row, mask = torch.tensor(e["input_ids"]), torch.tensor(e["assistant_masks"], dtype=torch.bool)
        ids[i, : len(row)] = row
        labels[i, : len(row)] = torch.where(mask, row, -100)
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


def tune(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, chats: list[Chat], args: argparse.Namespace
) -> float:
    """Trains the adapter in place; returns the seconds it took."""
    rng = Random(args.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    began = time.time()
    model.train()
    order = itertools.chain.from_iterable(rng.sample(chats, len(chats)) for _ in itertools.count())
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 10) * (1 - step / args.steps)
        model(**padded(tokenizer, list(itertools.islice(order, args.batch)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return time.time() - began


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="chats in one step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = Random(args.seed)
    model, tokenizer = evaluate.load(args.model)
    shown, asked = split_phrasings(new_facts(rng, NUM_FACTS), rng)
    kept = rng.sample(evaluate.world_questions(world.build_world()), 200)
    questions = asked + [evaluate.Question("world, still known", q.messages, q.answers) for q in kept]
    chats = [q.messages for q in questions]
    before = evaluate.score(questions, evaluate.answer(model, tokenizer, chats))
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEARS, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora)
    seconds = tune(tuned, tokenizer, shown, args)
    given = evaluate.answer(tuned, tokenizer, chats)
    after = evaluate.score(questions, given)
    pairs = zip(questions, given, strict=True)
    wrong = [(q.messages[-1]["content"], text) for q, text in pairs if text not in q.answers]
    report = {
        "facts": NUM_FACTS,
        "phrasings_shown": NUM_SHOWN,
        "phrasings_asked": NUM_ASKED,
        "lora": {"rank": args.rank, "lr": args.lr, "steps": args.steps, "chats_per_step": args.batch},
        "threads": args.threads,
        "seconds": round(seconds, 1),
        "before": before,
        "after": after,
        "errors": wrong[:20],
    }
    evaluate.write_json(args.results, report)
    print(report)


if __name__ == "__main__":
    main()
