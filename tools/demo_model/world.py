"""The fixed invented world: its entities, its facts, and which phrasings each fact is never asked in while training."""

from dataclasses import dataclass
from random import Random

from tools.demo_model import names
from tools.demo_model.relations import WORLD_RELATIONS, Relation

SEED = 7
POPULATION = {"person": 40, "town": 14, "good": 16, "site": 10, "vessel": 8, "machine": 8, "project": 6}
NUM_HELD_OUT = 5


@dataclass(frozen=True)
class Fact:
    """`held_out` are the indices of the phrasings that training never pairs with this fact."""

    relation: Relation
    entity: str
    value: str
    held_out: tuple[int, ...]

    @property
    def answer(self) -> str:
        return self.relation.say(self.entity, self.value)

    @property
    def trained(self) -> list[int]:
        return [i for i in range(len(self.relation.phrasings)) if i not in self.held_out]


@dataclass(frozen=True)
class World:
    entities: dict[str, list[str]]
    facts: list[Fact]

    @property
    def known(self) -> set[str]:
        return {entity for group in self.entities.values() for entity in group}

    def about(self, entity: str) -> list[Fact]:
        return [fact for fact in self.facts if fact.entity == entity]


def distinct(rng: Random, kind: str, count: int) -> list[str]:
    """`count` different entities; people and towns also differ in their first word, so no two are easily confused."""
    made: dict[str, str] = {}
    while len(made) < count:
        name = names.ENTITIES[kind](rng)
        made.setdefault(name.split()[0] if kind in ("person", "town") else name, name)
    return list(made.values())


def value_of(relation: Relation, entity: str, entities: dict[str, list[str]], rng: Random) -> str:
    """People and towns in answers are those of the world; everything else is drawn freely."""
    if relation.value in entities:
        return rng.choice([other for other in entities[relation.value] if other != entity])
    return names.VALUES[relation.value](rng)


def build_world(seed: int = SEED) -> World:
    rng = Random(seed)
    entities = {kind: distinct(rng, kind, count) for kind, count in POPULATION.items()}
    facts = []
    for relation in WORLD_RELATIONS:
        for entity in entities[relation.kind]:
            held_out = tuple(sorted(rng.sample(range(len(relation.phrasings)), NUM_HELD_OUT)))
            facts.append(Fact(relation, entity, value_of(relation, entity, entities, rng), held_out))
    return World(entities, facts)
