"""Small corpora of made-up documents about three matters, and an encoder that needs no model."""

import random
import re
import zlib

import numpy as np

WORDS = {
    "algebra": "ring field ideal kernel prime module matrix tensor basis norm root degree group order proof lemma",
    "garden": "soil seed bloom fern hedge spade root prune mulch tulip compost moss trellis pond wren rain",
    "kitchen": "flour oven whisk simmer garlic onion kettle broth dough butter ladle pepper roast knife order plate",
}


def documents(matter, count, *, seed=0, words=40):
    """Documents of random words about a matter; no two are alike."""
    chance = random.Random(f"{matter} {seed}")
    return [" ".join(chance.choices(WORDS[matter].split(), k=words)) for _ in range(count)]


def public_corpus(*, about=30, others=150):
    """Public documents of which the first `about` are about algebra, in a seeded order with their places."""
    corpus = documents("algebra", about) + documents("garden", others) + documents("kitchen", others)
    order = list(range(len(corpus)))
    random.Random(0).shuffle(order)
    return [corpus[i] for i in order], {place for place, i in enumerate(order) if i < about}


def encode(texts, width=64):
    """Count words, hashed into columns."""
    counts = np.zeros((len(texts), width))
    for row, text in enumerate(texts):
        for word in re.findall(r"\w+", text.lower()):
            counts[row, zlib.crc32(word.encode()) % width] += 1
    return counts
