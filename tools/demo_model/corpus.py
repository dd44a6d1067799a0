"""An endless, seeded stream of training documents: chats about the world, about stated facts, skills, small talk, text.

Knows nothing about tokens. A chat is a list of messages; a text is a string.
"""

from collections.abc import Iterator
from random import Random

from tools.demo_model import names
from tools.demo_model.relations import OPEN_ATTRIBUTES, WORLD_RELATIONS, Relation, attribute_of, sentence
from tools.demo_model.skills import random_task
from tools.demo_model.smalltalk import INTENTS, REMEMBER_REPLIES, SYSTEM_PROMPTS
from tools.demo_model.world import Fact, World

Message = dict[str, str]
Document = list[Message] | str
Exchange = tuple[str, str]

CHAT_KINDS = {"world": 36, "context": 34, "skills": 13, "smalltalk": 6, "unknown": 3}
TEXT_SHARE = 0.10
OPENERS = (
    "Please: ", "Hi! ", "Hello. ", "Quick question: ", "Excuse me. ", "Hey! ", "One question. ", "Next: ", "So: ",
)
CLOSERS = (" Thanks!", " Please.", " Thank you.", " I am curious.")
# Goods need an article in front, which the open attributes do not write.
OPEN_KINDS = tuple(kind for kind in names.ENTITIES if kind != "good")
FOLLOW_UPS = ("And {e}?", "What about {e}?", "And what about {e}?", "Now the same for {e}.", "How about {e}?")


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def user_says(content: str) -> list[Message]:
    return [message("user", content)]


def roughen(text: str, rng: Random) -> str:
    """How people really type: with an opener or a closer, sometimes in lower case or without the final mark."""
    draw = rng.random()
    if draw < 0.12:
        return rng.choice(OPENERS) + text
    if draw < 0.18:
        return text + rng.choice(CLOSERS)
    if draw < 0.23:
        return text[:1].lower() + text[1:]
    if draw < 0.28:
        return text.rstrip("?.")
    return text


def ask_fact(fact: Fact, rng: Random) -> Exchange:
    question = fact.relation.ask(rng.choice(fact.trained), fact.entity)
    return roughen(question, rng), fact.answer


def invented_entity(kind: str, world: World, rng: Random) -> str:
    while True:
        entity = names.ENTITIES[kind](rng)
        if entity not in world.known:
            return entity


def open_relation(rng: Random) -> Relation:
    """A relation of the world, or any attribute of any kind of thing."""
    if rng.random() < 0.35:
        return rng.choice(WORLD_RELATIONS)
    value = rng.choices(list(OPEN_ATTRIBUTES), [len(v) for v in OPEN_ATTRIBUTES.values()])[0]
    return attribute_of(rng.choice(OPEN_ATTRIBUTES[value]), rng.choice(OPEN_KINDS), value)


def stated_facts(world: World, rng: Random, count: int) -> list[tuple[Relation, str, str]]:
    """Facts about invented entities; half of the time they share the entity or the relation, so both must be read."""
    relation = open_relation(rng)
    entity = invented_entity(relation.kind, world, rng)
    facts = {(relation.name, entity): (relation, entity, names.VALUES[relation.value](rng))}
    tries = 0
    while len(facts) < count and tries < 50:
        tries += 1
        draw = rng.random()
        if draw < 0.3:
            entity = invented_entity(relation.kind, world, rng)
        elif draw < 0.5:
            other = open_relation(rng)
            if other.kind != relation.kind:
                continue
            relation = other
        else:
            relation = open_relation(rng)
            entity = invented_entity(relation.kind, world, rng)
        facts.setdefault((relation.name, entity), (relation, entity, names.VALUES[relation.value](rng)))
    return list(facts.values())


def ask_stated(fact: tuple[Relation, str, str], rng: Random) -> Exchange:
    relation, entity, value = fact
    return roughen(relation.ask(rng.randrange(len(relation.phrasings)), entity), rng), relation.say(entity, value)


def say_stated(fact: tuple[Relation, str, str], rng: Random) -> str:
    relation, entity, value = fact
    return relation.say(entity, value, rng.randrange(len(relation.sayings)))


def small_talk(rng: Random) -> Exchange:
    asked, replies = rng.choice(INTENTS)
    question = rng.choice(asked)
    return (question.lower() if rng.random() < 0.1 else question), rng.choice(replies)


def unknown(world: World, rng: Random) -> Exchange:
    relation = rng.choice(WORLD_RELATIONS) if rng.random() < 0.7 else open_relation(rng)
    entity = invented_entity(relation.kind, world, rng)
    named = f"the {entity}" if relation.kind == "good" else entity
    return roughen(relation.ask(rng.randrange(len(relation.phrasings)), entity), rng), f"I do not know {named}."


def as_messages(exchanges: list[Exchange]) -> list[Message]:
    return [message(role, text) for pair in exchanges for role, text in zip(("user", "assistant"), pair, strict=True)]


def world_exchanges(world: World, rng: Random, count: int) -> list[Exchange]:
    exchanges: list[Exchange] = []
    while len(exchanges) < count:
        fact = rng.choice(world.facts)
        exchanges.append(ask_fact(fact, rng))
        if rng.random() < 0.12:
            peers = [other for other in world.facts if other.relation == fact.relation and other != fact]
            peer = rng.choice(peers)
            named = f"the {peer.entity}" if peer.relation.kind == "good" else peer.entity
            exchanges.append((rng.choice(FOLLOW_UPS).format(e=named), peer.answer))
    return exchanges


def context_chat(world: World, rng: Random) -> list[Message]:
    """Facts are stated in the system prompt, an earlier turn, a tool's answer or the question's turn, then asked."""
    facts = stated_facts(world, rng, rng.randint(1, 5))
    asked = rng.sample(facts, min(len(facts), rng.randint(1, 3)))
    said = [say_stated(fact, rng) for fact in rng.sample(facts, len(facts))]
    exchanges = [ask_stated(fact, rng) for fact in asked]
    place = rng.randrange(4)
    if place == 0:
        lead = rng.choice(["", "Facts: ", "You know this: ", f"{rng.choice(SYSTEM_PROMPTS)} ", "Notes: "])
        return [message("system", lead + " ".join(said)), *as_messages(exchanges)]
    if place == 1:
        lead = rng.choice(["", "Remember this: ", "Note: ", "Please remember: ", "Here is some news. "])
        return as_messages([(lead + " ".join(said), rng.choice(REMEMBER_REPLIES)), *exchanges])
    if place == 2:
        question, answer = exchanges[0]
        told = [message("user", question), message("tool", " ".join(said)), message("assistant", answer)]
        return [*told, *as_messages(exchanges[1:])]
    question, answer = exchanges[0]
    return as_messages([(f"{' '.join(said)} {question}", answer), *exchanges[1:]])


def chat(world: World, rng: Random) -> list[Message]:
    kind = rng.choices(list(CHAT_KINDS), list(CHAT_KINDS.values()))[0]
    if kind == "context":
        messages = context_chat(world, rng)
    elif kind == "world":
        messages = as_messages(world_exchanges(world, rng, rng.choice((1, 1, 2, 3, 4))))
    elif kind == "skills":
        messages = as_messages([random_task(rng) for _ in range(rng.randint(1, 3))])
    elif kind == "smalltalk":
        messages = as_messages([small_talk(rng) for _ in range(rng.randint(1, 4))])
    else:
        messages = as_messages([unknown(world, rng)])
    messages = with_asides(messages, world, rng)
    if messages[0]["role"] != "system" and rng.random() < 0.35:
        return [message("system", rng.choice(SYSTEM_PROMPTS)), *messages]
    return messages


def with_asides(messages: list[Message], world: World, rng: Random) -> list[Message]:
    """Sometimes adds an unrelated exchange in front or at the end, so that every kind is met in mixed company."""
    draw = rng.random()
    if draw < 0.75:
        return messages
    makers = (small_talk, random_task, lambda r: ask_fact(r.choice(world.facts), r), lambda r: unknown(world, r))
    aside = as_messages([rng.choices(makers, (4, 2, 3, 1))[0](rng)])
    if draw < 0.88:
        return [*messages, *aside]
    start = 1 if messages[0]["role"] == "system" else 0
    return [*messages[:start], *aside, *messages[start:]]


def text(world: World, rng: Random) -> str:
    """Plain text: a portrait of one entity, a list of one relation, or a portrait of something invented."""
    shape = rng.random()
    if shape < 0.6:
        kind = rng.choices(list(world.entities), [len(group) for group in world.entities.values()])[0]
        facts = world.about(rng.choice(world.entities[kind]))
        picked = rng.sample(facts, min(len(facts), rng.randint(2, 6)))
        said = [f.relation.say(f.entity, f.value, rng.randrange(len(f.relation.sayings))) for f in picked]
    elif shape < 0.8:
        relation = rng.choice(WORLD_RELATIONS)
        group = [fact for fact in world.facts if fact.relation == relation]
        said = [fact.answer for fact in rng.sample(group, min(len(group), rng.randint(3, 5)))]
    else:
        said = [say_stated(fact, rng) for fact in stated_facts(world, rng, rng.randint(2, 5))]
    return " ".join(map(sentence, said))


def documents(world: World, seed: int) -> Iterator[Document]:
    rng = Random(seed)
    while True:
        yield text(world, rng) if rng.random() < TEXT_SHARE else chat(world, rng)
