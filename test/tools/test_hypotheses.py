"""tools/hypotheses.py: what is counted, on a student small enough to look at."""

import importlib.util
from pathlib import Path

import pytest
import torch
from rapidfuzz.distance import Levenshtein

from espnet_pl.methods import lpm
from espnet_pl.parts.objectives import Objectives
from espnet_pl.parts.pseudo_labels import propose
from test.toys import speaking_student, utterances

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("hypotheses", ROOT / "tools/hypotheses.py")
hypotheses = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hypotheses)


def measure(truth=None, beam=8):
    student, x = speaking_student(), utterances(n=6)
    said = propose(student, x).labels
    return hypotheses.measure(student, x, truth(said) if truth else said, [1.0], beam)


def test_who_is_right_has_no_errors():
    found = measure()
    assert found["greedy"] == found["consensus"] == found["oracle"] == 0
    assert 0 < found["w^4"] < found["w^2"] < found["w^1"]
    assert found["entropy"] > 0 and found["tokens"] > 6


def test_errors_are_counted_against_the_truth():
    found = measure(lambda said: [y[1:] for y in said])
    assert found["greedy"] == 6  # one inserted each
    assert found["oracle"] <= min(found["best"], found["risk"]) <= found["w^1"] + 6
    alone = measure(lambda said: [y[1:] for y in said], beam=1)
    assert alone["best"] == alone["risk"] == alone["oracle"] == pytest.approx(alone["w^2"])
    assert alone["entropy"] == pytest.approx(0.0, abs=1e-6)


UNKNOWN = 3


class Prefers:
    """A language model that is sure of one sentence, and knows no text with token UNKNOWN."""

    def __init__(self, sentence):
        self.sentence = sentence

    def log_p(self, sequences):
        log_p = [
            -torch.inf if UNKNOWN in y else 0.0 if y == self.sentence else -100.0 for y in sequences
        ]
        return torch.tensor(log_p, dtype=torch.float64)


def test_a_language_model_chooses_among_what_lpm_would_keep():
    student, x = speaking_student(), utterances(n=1)
    greedy = propose(student, x).labels[0]
    others = propose(student, x, Objectives(sequences=1.0, beam=8)).records[0]
    rows = [y[:n] for y, n in zip(others["labels"].tolist(), others["lengths"].tolist())]
    least, most = lpm.Config().band(len(greedy))
    same = [y for y in rows if least <= len(y) <= most and UNKNOWN not in y]
    assert 1 < len(same) < len(rows)
    found = hypotheses.measure(student, x, [same[1]], [1.0], 8, Prefers(same[1]))
    assert [found["lm"], found["lm·w"], found["surprise"]] == pytest.approx([0, 0, 0], abs=1e-6)
    assert found["uniform"] == pytest.approx(
        sum(Levenshtein.distance(y, same[1]) for y in same) / len(same)
    )
    silent = hypotheses.measure(student, x, [same[1]], [1.0], 8, Prefers(None))
    assert silent["lm"] == pytest.approx(silent["uniform"]) and silent["surprise"] == 100
