"""Who and what is on the island: people with their facts, companies, remedies, towns and roads."""

import heapq
import itertools
import random
import zlib
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from helpers.world.words import (
    ANIMALS,
    DISHES,
    DOSES,
    GOODS,
    HERBS,
    INSTRUMENTS,
    REGIONS,
    SYMPTOMS,
    TRADES,
    WORLD_VERSION,
    YEARLY_PROFITS,
)


@dataclass(frozen=True)
class Person:
    """A person, illness or company. `rank` 1 is the most often mentioned; `facts` maps relation names to values."""

    name: str
    rank: int
    facts: dict[str, str] = field(hash=False)


def is_held_out(item: str) -> bool:
    """Whether this name, sum or mapping belongs to the tenth of all items that training never uses."""
    return zlib.crc32(item.encode()) % 10 == 0


class Island:
    """The people, towns and roads of one Shima."""

    def __init__(self, seed: int = 0, num_people: int = 1000, zipf_exponent: float = 1.0):
        """Make the people and towns of the world; documents are made on demand."""
        self.seed = seed
        rng = random.Random(f"shima/{WORLD_VERSION}/{seed}")
        self.towns = sorted({syllables(rng, 2) for _ in range(40)})[:24]
        self.region_of = {town: rng.choice(REGIONS) for town in self.towns}
        self.values = {
            "town": self.towns,
            "trade": list(TRADES),
            "animal": list(ANIMALS),
            "dish": list(DISHES),
            "instrument": list(INSTRUMENTS),
        }
        self.functions: dict[str, dict[str, str]] = {
            "tool of the trade": TRADES,
            "young of the animal": ANIMALS,
            "region of the town": self.region_of,
            "material of the instrument": INSTRUMENTS,
            "base of the dish": DISHES,
        }
        self.person: dict[str, Person] = {}
        for rank in range(1, num_people + 1):
            name = self._fresh_name(rng, held_out=False)
            self.person[name] = Person(name, rank, self._facts(rng))
        self.people = list(self.person.values())
        self.domains = {
            "medicine": self._entities(rng, 40, {"symptom": SYMPTOMS, "herb": HERBS, "dose": DOSES}),
            "finance": self._entities(rng, 40, {"product": GOODS, "seat": self.towns, "profit": YEARLY_PROFITS}),
        }
        self.roads = self._make_roads(rng)
        self._cumulative = list(itertools.accumulate(1 / p.rank**zipf_exponent for p in self.people))

    def _facts(self, rng: random.Random) -> dict[str, str]:
        return {relation: rng.choice(values) for relation, values in self.values.items()}

    def _entities(self, rng: random.Random, n: int, values: dict[str, Sequence[str]]) -> list[Person]:
        facts = [{relation: rng.choice(choices) for relation, choices in values.items()} for _ in range(n)]
        return [Person(self._fresh_name(rng, held_out=True), rank, f) for rank, f in enumerate(facts, start=1)]

    def _make_roads(self, rng: random.Random) -> dict[str, set[str]]:
        """A ring through all towns and some short cuts: `roads[town]` are the towns one road away."""
        ring = rng.sample(self.towns, len(self.towns))
        pairs = list(itertools.pairwise([*ring, ring[0]])) + [rng.sample(ring, 2) for _ in range(len(ring) // 2)]
        roads: dict[str, set[str]] = {town: set() for town in self.towns}
        for a, b in pairs:
            roads[a].add(b)
            roads[b].add(a)
        return roads

    def _fresh_name(self, rng: random.Random, held_out: bool) -> str:
        """A name that nobody known bears, from the held-out names or from all others."""
        while True:
            name = syllables(rng, 3)
            if is_held_out(name) == held_out and name not in self.person:
                return name

    def stranger(self, rng: random.Random, held_out: bool) -> Person:
        """Somebody that no document knows, with a held-out name or one from all others; `rank` is 0."""
        return Person(self._fresh_name(rng, held_out), 0, self._facts(rng))

    def mention_probability(self, person: Person) -> float:
        """Probability that a mention of somebody is a mention of this person."""
        return (self._cumulative[person.rank - 1] - (self._cumulative[person.rank - 2] if person.rank > 1 else 0)) / (
            self._cumulative[-1]
        )

    def _mentioned(self, rng: random.Random) -> Person:
        return self.people[bisect(self._cumulative, rng.random() * self._cumulative[-1])]

    @cached_property
    def words(self) -> list[str]:
        """All common words with a counterpart, and their counterparts: the keys of label mappings."""
        tables = (TRADES, ANIMALS, DISHES, INSTRUMENTS)
        return sorted({word for table in tables for pair in table.items() for word in pair})

    def route(self, start: str, end: str) -> list[str]:
        """The towns on the shortest way, both ends included; of equally short ways the alphabetically first."""
        ways = [(1, [start])]  # a heap of ways with their number of towns
        while (way := heapq.heappop(ways)[1])[-1] != end:
            for town in self.roads[way[-1]].difference(way):
                heapq.heappush(ways, (len(way) + 1, [*way, town]))
        return way

    def is_shortest_route(self, towns: list[str], start: str, end: str) -> bool:
        """Whether the towns form a way along roads from `start` to `end` that is as short as any."""
        return (
            towns[:1] == [start]
            and towns[-1:] == [end]
            and all(b in self.roads.get(a, ()) for a, b in itertools.pairwise(towns))
            and len(towns) == len(self.route(start, end))
        )


def syllables(rng: random.Random, count: int) -> str:
    """A name of `count` syllables."""
    return "".join(rng.choice("bdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(count)).capitalize()
