"""Entities and their scores against outputs of seqeval 1.2.2 (default mode, micro average)."""

import numpy as np
import pytest

from sensmerge.tasks.kinds.entities import are_entity_tags, entities, f1, share

SPANS = [
    ("B-LOC O E-PER E-LOC I-LOC B-LOC E-PER", "LOC:0-0 PER:2-2 LOC:3-3 LOC:4-4 LOC:5-5 PER:6-6"),
    ("S-PER S-LOC I-PER E-LOC B-PER E-PER B-PER O", "PER:0-0 LOC:1-1 PER:2-2 LOC:3-3 PER:4-5 PER:6-6"),
    ("E-LOC B S-LOC B-PER E-PER", "LOC:0-0 :1-1 LOC:2-2 PER:3-4"),
    ("I-LOC E-LOC O S-PER B-LOC S-PER", "LOC:0-1 PER:3-3 LOC:4-4 PER:5-5"),
    ("E-LOC I-LOC I-LOC E-LOC", "LOC:0-0 LOC:1-3"),
    ("B I I O S-LOC I-LOC S-PER", ":0-2 LOC:4-4 LOC:5-5 PER:6-6"),
    ("S-LOC I-PER I-PER B-PER", "LOC:0-0 PER:1-2 PER:3-3"),
    ("I-LOC O O I B-PER", "LOC:0-0 :3-3 PER:4-4"),
    ("S-LOC E-PER I-LOC I-LOC I I B", "LOC:0-0 PER:1-1 LOC:2-3 :4-5 :6-6"),
    ("I-PER I-PER O B E-PER O", "PER:0-1 :3-3 PER:4-4"),
    ("O", ""),
]
EXPECTED = [
    "B-LOC I-LOC B-LOC B-LOC I-LOC O O O",
    "O B-LOC B-LOC O I-PER O B-PER",
    "O O B-LOC O O O I-LOC O",
    "O I-LOC O I-LOC O",
    "I-PER B-LOC O B-PER O O",
    "I-LOC B-PER",
    "I-PER O O B-LOC",
    "O B-LOC O I-LOC I-PER",
    "B-PER B-PER I-LOC",
    "B-LOC O I-LOC I-LOC O",
    "O I-LOC O O B-PER B-LOC B-PER O",
    "I-PER I-LOC O O I-PER I-LOC",
]
PREDICTED = [
    "B-LOC I-LOC B-LOC B-LOC I-LOC B-PER O O",
    "O B-LOC B-LOC O I-PER B-PER B-PER",
    "O O B-LOC O O I-LOC I-LOC O",
    "O I-LOC O I-LOC I-LOC",
    "I-PER B-LOC O I-PER I-LOC O",
    "I-LOC B-PER",
    "I-PER O O B-LOC",
    "O B-LOC O I-LOC I-PER",
    "B-PER I-LOC I-LOC",
    "B-LOC O I-PER I-LOC O",
    "O I-LOC O O B-PER B-LOC B-PER O",
    "I-PER I-LOC I-LOC O I-PER I-LOC",
]


@pytest.mark.parametrize(("tags", "spans"), SPANS)
def test_entities_are_those_of_seqeval(tags: str, spans: str) -> None:
    assert {f"{kind}:{first}-{last}" for kind, first, last in entities(tags.split())} == set(spans.split(" ")) - {""}


def test_scores_are_those_of_seqeval() -> None:
    pairs = [(entities(mine.split()), entities(own.split())) for mine, own in zip(PREDICTED, EXPECTED, strict=True)]
    counts = np.array([[len(mine & own), len(mine), len(own)] for mine, own in pairs], np.float64)
    assert f1(counts) == pytest.approx(0.7887323943661971, rel=1e-12)
    assert share(counts[:, [0, 1]]) == pytest.approx(0.7567567567567568, rel=1e-12)
    assert share(counts[:, [0, 2]]) == pytest.approx(0.8235294117647058, rel=1e-12)
    # Of several resamples at once; one without an entity scores 0, as in seqeval.
    several = np.stack([counts, counts[::-1], np.zeros_like(counts)])
    whole = float(f1(counts))
    assert f1(several).tolist() == pytest.approx([whole, whole, 0.0])
    part = float(share(counts[:, :2]))
    assert share(several[..., :2]).tolist() == pytest.approx([part, part, 0.0])


def test_what_tags_of_entities_are_called() -> None:
    assert are_entity_tags(["O", "B-PER", "I-PER"])
    assert are_entity_tags(["S-a b", "E-x", "B", "I"])
    assert not are_entity_tags(["O"])
    assert not are_entity_tags(["LABEL_0", "LABEL_1"])
    assert not are_entity_tags(["NOUN", "VERB", "O"])
    assert not are_entity_tags(["BPER", "O"])
