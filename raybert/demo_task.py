"""The demo task's rows: small opinions, generated offline and the same on every machine.

A row is a sentence whose label is the verdict of its main clause. Half of them praise one thing and
blame another, and any clause may be negated, so counting good and bad words gets little right:
which clause the sentence is about, and what is negated in it, decide. A damaged encoder therefore
does visibly worse than a sound one. A few labels are wrong on purpose, in every split, so that no
model reaches 100 %.
"""

from __future__ import annotations

import functools

import numpy as np

SIZES = {"train": 1600, "dev": 480, "test": 480}
"""Rows of each split."""

NOISE = 0.05
"""Share of labels that are flipped."""

FORMS = (0.25, 0.25, 0.5)
"""Shares of a clause alone, two that agree, and two that are opposed. What words alone tell comes
from the first two, and a small student learns from them first."""

LABELS = ("negative", "positive")

# fmt: off
# bad ones, good ones
ADJECTIVES = (
    (
        "bad", "awful", "boring", "dull", "weak", "terrible", "poor", "disappointing",
        "clumsy", "annoying", "cheap", "sloppy",
    ),
    (
        "good", "great", "exciting", "charming", "strong", "wonderful", "excellent",
        "impressive", "clever", "delightful", "elegant", "careful",
    ),
)
SUBJECTS = (
    "story", "plot", "cast", "music", "ending", "film", "script", "camera work", "acting",
    "book", "hotel", "service", "food", "room", "concert", "singer", "museum", "tour",
    "guide", "phone", "screen", "battery", "design", "game", "teacher", "lecture",
)
# fmt: on

# what is said of an adjective, and whether it turns the verdict round
SAYINGS = (
    ("was {a}", False),
    ("was really {a}", False),
    ("seemed {a} to me", False),
    ("was {a} from start to finish", False),
    ("was not {a}", True),
    ("was never {a}", True),
    ("was anything but {a}", True),
    ("was far from {a}", True),
)
# how a side remark {s} and the main clause {m} are joined
JOINTS = (
    "although the {s}, the {m}.",
    "the {s}, but the {m}.",
    "the {m}, even though the {s}.",
    "while the {s}, in the end the {m}.",
    "the {m}, despite claims that the {s}.",
    "they say that the {s}; I think the {m}.",
)

Draw = np.random.Generator


def _clause(draw: Draw, subject: str, good: bool) -> str:
    saying, turned = SAYINGS[draw.integers(len(SAYINGS))]
    words = ADJECTIVES[good != turned]
    return f"{subject} {saying.format(a=words[draw.integers(len(words))])}"


def _sentence(draw: Draw, good: bool) -> str:
    """A clause that is good or bad, alone or joined to one that agrees or says the opposite."""
    main, side = (SUBJECTS[i] for i in draw.choice(len(SUBJECTS), size=2, replace=False))
    form = draw.choice(["alone", "agreeing", "opposed"], p=FORMS)
    clause = _clause(draw, main, good)
    if form == "alone":
        text = f"the {clause}."
    elif form == "agreeing":
        text = f"the {clause}, and the {_clause(draw, side, good)}."
    else:
        joint = JOINTS[draw.integers(len(JOINTS))]
        text = joint.format(s=_clause(draw, side, not good), m=clause)
    return text[0].upper() + text[1:]


def demo_rows(split: str, seed: int = 0) -> dict[str, list[str]]:
    """The rows of one split, half of each label before the noise.

    Args:
        split: ``train``, ``dev`` or ``test``; no two of them share a sentence.
        seed: another seed is another draw of the same task.

    Returns:
        Columns ``text`` and ``label`` (a name of ``LABELS``), equally long.
    """
    return {key: list(values) for key, values in _splits(seed)[split].items()}


@functools.cache
def _splits(seed: int) -> dict[str, dict[str, list[str]]]:
    """All splits, drawn from one stream: what an earlier one holds, a later one skips."""
    draw = np.random.default_rng([seed, 2024])
    seen: set[str] = set()
    splits: dict[str, dict[str, list[str]]] = {}
    for name, size in SIZES.items():
        columns: dict[str, list[str]] = {"text": [], "label": []}
        while len(columns["text"]) < size:
            good = len(columns["text"]) % 2 == 1
            text = _sentence(draw, good)
            if text in seen:
                continue
            seen.add(text)
            flipped = draw.random() < NOISE
            columns["text"].append(text)
            columns["label"].append(LABELS[good != flipped])
        order = draw.permutation(size)
        splits[name] = {key: [values[i] for i in order] for key, values in columns.items()}
    return splits
