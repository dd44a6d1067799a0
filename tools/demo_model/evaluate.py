"""Greedy answers of a saved model, judged by exact match, class by class.

The world's questions use only phrasings that training never paired with their fact.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tools.demo_model import corpus
from tools.demo_model.relations import WORLD_RELATIONS
from tools.demo_model.skills import SKILLS
from tools.demo_model.smalltalk import INTENTS
from tools.demo_model.world import World

NUM_PER_CLASS = 300


@dataclass(frozen=True)
class Question:
    """A chat that ends with the user's question, and every answer that counts as right."""

    group: str
    messages: list[corpus.Message]
    answers: tuple[str, ...]


def world_questions(world: World) -> list[Question]:
    """Every fact in every phrasing held out for it."""
    return [
        Question(f"world {fact.relation.name}", corpus.user_says(fact.relation.ask(i, fact.entity)), (fact.answer,))
        for fact in world.facts
        for i in fact.held_out
    ]


def context_questions(world: World, rng: Random, count: int) -> list[Question]:
    """The last question of chats in which facts about invented entities are stated."""
    made = []
    for _ in range(count):
        messages = corpus.context_chat(world, rng)
        made.append(Question("context", messages[:-1], (messages[-1]["content"],)))
    return made


def late_questions(world: World, rng: Random, count: int) -> list[Question]:
    """A held-out question about the world after ten other exchanges."""
    made = []
    for _ in range(count):
        before = [
            corpus.small_talk(rng) if rng.random() < 0.3 else corpus.world_exchanges(world, rng, 1)[0]
            for _ in range(10)
        ]
        fact = rng.choice(world.facts)
        asked = corpus.user_says(fact.relation.ask(rng.choice(fact.held_out), fact.entity))
        made.append(Question("world, after ten turns", corpus.as_messages(before) + asked, (fact.answer,)))
    return made


def skill_questions(rng: Random, count: int) -> list[Question]:
    made = []
    for name, (maker, _) in SKILLS.items():
        for _ in range(count):
            question, answer = maker(rng)
            made.append(Question(name, corpus.user_says(question), (answer,)))
    return made


def small_talk_questions() -> list[Question]:
    return [Question("small talk", corpus.user_says(said), replies) for asked, replies in INTENTS for said in asked]


def unknown_questions(world: World, rng: Random, count: int) -> list[Question]:
    made = []
    for _ in range(count):
        question, answer = corpus.unknown(world, rng)
        made.append(Question("unknown", corpus.user_says(question), (answer,)))
    return made


def all_questions(world: World, seed: int = 99, count: int = NUM_PER_CLASS) -> list[Question]:
    rng = Random(seed)
    return [
        *world_questions(world),
        *late_questions(world, rng, count),
        *context_questions(world, rng, count),
        *skill_questions(rng, count),
        *small_talk_questions(),
        *unknown_questions(world, rng, count),
    ]


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    chats: list[list[corpus.Message]],
    sample: bool = False,
    batch_size: int = 64,
) -> list[str]:
    """One answer for each chat; chats of similar length share a batch."""
    prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in picked],
            return_tensors="pt",
            return_token_type_ids=False,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        choice = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {"do_sample": False}
        out = model.generate(**batch, max_new_tokens=48, **choice)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(picked, texts, strict=True):
            answers[i] = text
    return answers


def score(questions: list[Question], answers: list[str]) -> dict[str, dict[str, float]]:
    """Accuracy and number of questions of each group, with "world" over all of the world's relations."""
    table: dict[str, list[bool]] = {}
    for question, given in zip(questions, answers, strict=True):
        right = given in question.answers
        table.setdefault(question.group, []).append(right)
        if question.group.removeprefix("world ") in {relation.name for relation in WORLD_RELATIONS}:
            table.setdefault("world", []).append(right)
    return {group: {"accuracy": round(sum(r) / len(r), 4), "questions": len(r)} for group, r in sorted(table.items())}


def sampled_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, float]:
    """How often one sample at temperature 1 is right, for every skill."""
    torch.manual_seed(5)
    questions = skill_questions(Random(123), count)
    given = answer(model, tokenizer, [q.messages for q in questions], sample=True)
    return {group: row["accuracy"] for group, row in score(questions, given).items()}


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The saved bfloat16 weights; arithmetic in float32, so that the numbers do not depend on the machine's kernels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    return model, AutoTokenizer.from_pretrained(folder)


def evaluate(world: World, folder: Path, count: int = NUM_PER_CLASS) -> dict:
    model, tokenizer = load(folder)
    questions = all_questions(world, count=count)
    began = time.time()
    given = answer(model, tokenizer, [q.messages for q in questions])
    wrong = [
        {"group": q.group, "asked": q.messages[-1]["content"], "wanted": q.answers[0], "given": text}
        for q, text in zip(questions, given, strict=True)
        if text not in q.answers
    ]
    return {
        "greedy": score(questions, given),
        "sampled_at_temperature_1": sampled_accuracy(model, tokenizer, count),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.time() - began, 1),
        "examples_of_errors": Random(0).sample(wrong, min(len(wrong), 30)),
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
