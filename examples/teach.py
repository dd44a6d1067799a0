"""Teach the embedded model forty facts while it goes on chatting: `make serve` in one terminal, this in another.

Draws facts by seed that the model cannot know, trains a LoRA adapter on them through the OpenAI fine-tuning API, and
asks again in phrasings that occur nowhere in the training file. A chat in the background measures its latency all the
while. Exit code 0 where at least 90 % of the answers are right afterwards, 1 where not.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any, NamedTuple

from openai import OpenAI, OpenAIError

NUM_FACTS = 40
GOAL = 0.9
# Some 42,000 tokens: 97 to 100 % right in a plain PEFT loop, on each of eight seeds; a fifth fewer gave 92 to 97 %.
N_EPOCHS, BATCH_SIZE = 5, 16
SETTINGS = {"rank": 16, "learning_rate": 5e-3, "schedule": "linear", "warmup_steps": 5, "checkpoint_every": 1000}
ALONE_S = 8.0
PAUSE_S = 0.3
SMALL_TALK = (
    "Hello!", "Who are you?", "What can you do?", "Tell me a joke.", "How big are you?", "What is Tandem?",
    "Can you learn?", "Who made you?", "Are you smart?", "How are you?",
)  # fmt: skip

STARTS = "Mi Da Lo Ke Ru Sa To Ve Ni Be Ha Jo Pe Ri Fe Ga Wi Zo Lu Ma Ta Ce Do Ya".split()
ENDS = "ra no la ri sa vin del mo na ren ka lis tan bel so mir ya ko dan ly".split()
HOUSES = "Bar Hol Ven Tor Kal Mar Fen Gor Lin Pol Sor Wen Dun Cal Ros Bren Hal Nor Tam Vor".split()
FAMILIES = "ton dale mann wick sen by ley ford ner vik low gard stone well der nik".split()
TOWNS = ["haven", "bridge", "port", "field", "mouth", "burg", " Bay", " Hill", " Falls", " Cross"]
COLOURS = "red blue green yellow purple orange white black grey brown pink silver golden amber violet".split()
ANIMALS = "fox otter owl raven badger heron lynx turtle rabbit crow wolf bear seal frog tiger zebra".split()
NOUNS = "Harbor River Forest Canyon Meadow Valley Lantern Anchor Falcon Maple Willow Summit Garden Mill".split()
SITES = "depot station warehouse vault laboratory office archive garage workshop clinic".split()
MACHINES = "robot drone printer pump engine turbine scanner crane".split()


class Kind(NamedTuple):
    """One kind of fact: how it is answered, how it is asked in training, and how it is asked only afterwards."""

    answer: str
    shown: tuple[str, ...]
    asked: tuple[str, ...]


def attribute(name: str) -> Kind:
    """Facts such as "The captain of the ship Velora is Mira Kalby."."""
    return Kind(
        f"The {name} of {{e}} is {{v}}.",
        (
            f"What is the {name} of {{e}}?",
            f"What {name} does {{e}} have?",
            f"Which {name} belongs to {{e}}?",
            f"Tell me what the {name} of {{e}} is.",
            f"Give me {{e}}'s {name}.",
            f"I need the {name} of {{e}}.",
        ),
        (
            f"Do you happen to know {{e}}'s {name}?",
            f"Please name the {name} of {{e}}.",
            f"I want to find out which {name} {{e}} has.",
        ),
    )


HOME = Kind(
    "{e} lives in {v}.",
    (
        "Where does {e} live?",
        "In which town does {e} live?",
        "Tell me where {e} lives.",
        "Where is {e} at home?",
        "What is the home town of {e}?",
        "Give me the town where {e} lives.",
    ),
    (
        "What town is {e} living in?",
        "I would like to know in which town {e} lives.",
        "Please name the home town of {e}.",
    ),
)


class Fact(NamedTuple):
    kind: Kind
    entity: str
    value: str

    @property
    def answer(self) -> str:
        return capital(self.kind.answer.format(e=self.entity, v=self.value))

    def questions(self, phrasings: tuple[str, ...]) -> list[str]:
        return [capital(phrasing.format(e=self.entity)) for phrasing in phrasings]


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def word(rng: Random) -> str:
    return rng.choice(STARTS) + rng.choice(["", "lo", "na", "vi", "ta", "mi"]) + rng.choice(ENDS)


def person(rng: Random) -> str:
    return rng.choice(STARTS) + rng.choice(ENDS) + " " + rng.choice(HOUSES) + rng.choice(FAMILIES)


def town(rng: Random) -> str:
    return rng.choice(HOUSES) + rng.choice(TOWNS)


def site(rng: Random) -> str:
    return f"the {rng.choice(COLOURS).capitalize()} {rng.choice(NOUNS)} {rng.choice(SITES)}"


def ship(rng: Random) -> str:
    return f"the ship {word(rng)}"


def machine(rng: Random) -> str:
    return f"the {word(rng)} {rng.choice(MACHINES)}"


def code(rng: Random) -> str:
    return f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)} {rng.randint(10, 99)}"


def serial(rng: Random) -> str:
    return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2)) + f"-{rng.randint(100, 9999)}"


KINDS = (
    (attribute("access code"), site, code),
    (attribute("captain"), ship, person),
    (attribute("serial number"), machine, serial),
    (HOME, person, town),
)


def draw_facts(rng: Random, count: int) -> list[Fact]:
    """`count` facts in equal parts of each kind; no two things share a name, and no two facts a value."""
    facts: list[Fact] = []
    taken: set[str] = set()
    while len(facts) < count:
        kind, entity, value = KINDS[len(facts) % len(KINDS)]
        fact = Fact(kind, entity(rng), value(rng))
        names = {fact.value, *fact.entity.split()} - {"the", "ship", *SITES, *MACHINES}
        if not names & taken:
            taken |= names
            facts.append(fact)
    return facts


def training_file(facts: list[Fact]) -> bytes:
    """One chat per fact and phrasing, as JSONL."""
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": fact.answer}]}
        for fact in facts
        for question in fact.questions(fact.kind.shown)
    ]
    return "".join(json.dumps(chat) + "\n" for chat in chats).encode()


def held_out(facts: list[Fact], training: bytes) -> list[tuple[str, str]]:
    """(question, value that a right answer contains), none of the questions in the training file."""
    asked = [(question, fact.value) for fact in facts for question in fact.questions(fact.kind.asked)]
    assert not any(question.encode() in training for question, _ in asked)
    return asked


def accuracy(client: OpenAI, model: str, questions: list[tuple[str, str]], workers: int = 8) -> tuple[float, list[str]]:
    """The share of right answers, and lines that show some of the wrong ones."""

    def ask(question: str) -> str:
        messages: Any = [{"role": "user", "content": question}]
        reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=48)
        return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(ask, [question for question, _ in questions]))
    wrong = [
        f"  {question}  ->  {answer}  (not {value})"
        for (question, value), answer in zip(questions, answers, strict=True)
        if not re.search(rf"(?<![\w-]){re.escape(value)}(?![\w-])", answer)
    ]
    return 1 - len(wrong) / len(questions), wrong[:5]


class Chat(threading.Thread):
    """Somebody who goes on talking to the base model; `mark()` takes what was measured since the last mark."""

    def __init__(self, client: OpenAI, model: str, seed: int) -> None:
        super().__init__(daemon=True)
        self.client, self.model, self.rng = client, model, Random(seed)
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.failed: str | None = None
        self.ends = threading.Event()

    def run(self) -> None:
        while not self.ends.wait(PAUSE_S):
            try:
                self.talk(self.rng.choice(SMALL_TALK))
            except OpenAIError as error:
                self.failed = str(error)
                return

    def talk(self, said: str) -> None:
        messages: Any = [{"role": "user", "content": said}]
        began, arrived, count, reason = time.perf_counter(), [], 0, None
        stream = self.client.chat.completions.create(
            model=self.model, messages=messages, stream=True, stream_options={"include_usage": True}, max_tokens=64
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                arrived.append(time.perf_counter())
            if chunk.choices:
                reason = chunk.choices[0].finish_reason or reason
            if chunk.usage:
                count = chunk.usage.completion_tokens
        if arrived:
            self.ttft.append(arrived[0] - began)
        # The token that ends a text is counted and not shown.
        shown = count - (reason == "stop")
        if shown > 1:
            self.tpot.append((arrived[-1] - arrived[0]) / (shown - 1))

    def mark(self) -> tuple[list[float], list[float]]:
        taken = self.ttft, self.tpot
        self.ttft, self.tpot = [], []
        return taken


def latency(name: str, ttft: list[float], tpot: list[float]) -> str:
    shown = [
        f"{what} p50 {1e3 * statistics.median(values):.1f} ms, p95 {1e3 * p95(values):.1f} ms"
        for what, values in (("TPOT", tpot), ("TTFT", ttft))
        if values
    ]
    return f"chat {name}: {len(ttft)} replies, {', '.join(shown)}"


def p95(values: list[float]) -> float:
    return sorted(values)[round(0.95 * (len(values) - 1))]


def server_target(client: OpenAI) -> float | None:
    """The server's TPOT target in seconds, where its metrics say it."""
    url = str(client.base_url.copy_with(path="/metrics"))
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {client.api_key}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        found = re.search(r"^tandem:slo_tpot_seconds(?:{.*})? (\S+)$", reply.read().decode(), re.M)
    return float(found[1]) if found and float(found[1]) > 0 else None


def train(client: OpenAI, model: str, training: bytes, seed: int) -> Any:
    """Upload, start the job, show its progress; the finished job."""
    file = client.files.create(file=("facts.jsonl", training), purpose="fine-tune")
    hyperparameters: Any = {"n_epochs": N_EPOCHS, "batch_size": BATCH_SIZE}
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        suffix="facts",
        seed=seed % 2**31,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        extra_body={"tandem": SETTINGS},
    )
    print(f"job {job.id} on {file.filename} ({file.bytes:,} bytes)")
    shown_at = time.perf_counter()
    # A terminal's line is written over, elsewhere each line stays.
    start, end, pause_s = ("\r", "", 1.0) if sys.stdout.isatty() else ("", "\n", 5.0)
    try:
        while job.status not in ("succeeded", "failed", "cancelled"):
            time.sleep(1.0)
            if time.perf_counter() - shown_at >= pause_s:
                shown_at = time.perf_counter()
                print(f"{start}{progress(client, job.id):<79}", end=end, flush=True)
            job = client.fine_tuning.jobs.retrieve(job.id)
    except KeyboardInterrupt:
        client.fine_tuning.jobs.cancel(job.id)
        raise
    print(f"{start}{progress(client, job.id):<79}")
    return job


def progress(client: OpenAI, job_id: str) -> str:
    """The job's latest step, or the latest thing it said."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=10).data
    found: Any = next((event.data for event in events if event.type == "metrics"), None)
    if not found:
        return events[0].message if events else ""
    done, total = found["step"], found["total_steps"]
    rate = f", {found['tokens_per_s']:,.0f} tokens/s" if found.get("tokens_per_s") else ""
    return f"step {done}/{total} [{'#' * round(30 * done / total):<30}] loss {found['train_loss']:.3f}{rate}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--model", help="the base model (default: the first that the server lists)")
    parser.add_argument("--seed", type=int, default=0, help="draws the facts and the order of training")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    try:
        # Adapters are listed with their base model as parent.
        bases = [model.id for model in client.models.list() if not getattr(model, "parent", None)]
        return teach(client, options.model or bases[0], options.seed)
    except KeyboardInterrupt:
        return 130
    except OpenAIError as error:
        print(f"teach: {options.base_url}: {error} (is the server running? make serve)", file=sys.stderr)
        return 1


def teach(client: OpenAI, model: str, seed: int) -> int:
    began = time.perf_counter()
    facts = draw_facts(Random(seed), NUM_FACTS)
    training = training_file(facts)
    questions = held_out(facts, training)
    print(f"{NUM_FACTS} facts, such as: {facts[0].answer} {facts[1].answer}")
    before, _ = accuracy(client, model, questions)
    print(f"before: {before:.1%} of {len(questions)} questions right")

    chat = Chat(client, model, seed)
    chat.start()
    time.sleep(ALONE_S)
    alone = chat.mark()
    job = train(client, model, training, seed)
    during = chat.mark()
    chat.ends.set()
    if job.status != "succeeded":
        print(f"the job has {job.status}: {job.error.message if job.error else 'no reason given'}", file=sys.stderr)
        return 1

    after, wrong = accuracy(client, job.fine_tuned_model, questions)
    print(f"after:  {after:.1%} of {len(questions)} questions right, by {job.fine_tuned_model}")
    print("\n".join([*wrong, latency("alone", *alone), latency("while training", *during)]))
    if chat.failed or not (alone[1] and during[1]):
        print(f"the chat broke off: {chat.failed or 'no replies'}", file=sys.stderr)
        return 1
    target = server_target(client)
    said = "the server's target" if target else "twice the median alone"
    target = target or 2 * statistics.median(alone[1])
    verdict = "within" if p95(during[1]) <= target else "OVER"
    print(f"chat TPOT p95 while training is {verdict} {1e3 * target:.1f} ms, {said}")
    print(f"{time.perf_counter() - began:.0f} s in all")
    return 0 if after >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
