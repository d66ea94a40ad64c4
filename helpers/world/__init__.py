"""Shima, the small world of this course: its people, facts, documents and questions.

Everything here is made by a seeded generator, so no real model has read any of it. The package knows nothing of
tokens, tensors or files. A document is a pure function of the world's seed, a stream's seed and the document's
index: streams need no state, can be entered anywhere and are the same on every machine.

Two things are kept apart throughout. *Training* documents use only training names, training phrasings, training
sums and training mappings. *Held-out* questions use only those that training never uses: the split is decided by
`is_held_out`, a hash of the item's text, so it needs no list and cannot drift.
"""

from helpers.world.documents import PRETRAINING_MIXTURE, ask, sum_with_steps
from helpers.world.entities import Person, is_held_out
from helpers.world.phrasings import DOMAIN_RELATIONS, RELATIONS
from helpers.world.questions import Question
from helpers.world.words import CHAT_TASKS, FILLERS, HELD_OUT_FUNCTIONS, LABELS, MOODS, POLITE
from helpers.world.world import Preference, World, true_reward

__all__ = [
    "CHAT_TASKS",
    "DOMAIN_RELATIONS",
    "FILLERS",
    "HELD_OUT_FUNCTIONS",
    "LABELS",
    "MOODS",
    "POLITE",
    "PRETRAINING_MIXTURE",
    "RELATIONS",
    "Person",
    "Preference",
    "Question",
    "World",
    "ask",
    "is_held_out",
    "sum_with_steps",
    "true_reward",
]
