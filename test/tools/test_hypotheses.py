"""tools/hypotheses.py: what is counted, on a student small enough to look at."""

import importlib.util
from pathlib import Path

import pytest

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
