"""The collapse of soft labels in small, and what each regulariser changes of it.

The toy has heard clean frames; what it hears without transcripts is noisier.  Soft labels of its
own frames, live, drive the blank out of it within 150 updates; everything here is that run, with
one setting changed.  Who is weighed by confidence, and by how much: test/parts/test_objectives.
"""

import functools
import math

import pytest
import torch

from espnet_pl.methods.base import Batch, Utterances
from espnet_pl.methods.registry import build
from espnet_pl.parts.pseudo_labels import label_error_rate, propose, student_statistics
from test.toys import VOCABULARY, speaking_student, utterances

LIVE = {"capacity": 0, "labelled": 0, "unlabelled": 1}
SOFT = {"hard": 0.0, "soft": 1.0}
BATCHES = 20


def noisy(number, noise=0.5):
    """A batch without transcripts, and what was said in it."""
    x = utterances(n=8, seed=number, prefix=f"{number}-")
    g = torch.Generator().manual_seed(number + 999)
    speech = x.speech + noise * torch.randn(x.speech.shape, generator=g)
    truth = [[a] if a == b else [a, b] for a, b in x.text.tolist()]
    return Utterances(x.utt_id, speech, x.speech_lengths), truth


@functools.cache
def outcome(conf=(), seed=0, blank_bias=0.0, updates=150):
    """What the student is like at the end: its statistics, and its label error rate."""
    student = speaking_student(seed).train()
    with torch.no_grad():
        student.out.bias[0] += blank_bias
    method = build("slimipl", {**LIVE, **dict(conf)}, student)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    torch.manual_seed(seed)
    for update in range(updates):
        x, _ = noisy(update % BATCHES)
        enters = method.cached and (update < BATCHES or torch.rand(()) < 0.1)
        terms = method(student, Batch(unlabelled=x, fresh=x if enters else None))
        optimizer.zero_grad()
        sum(t.weight * t.value for t in terms.values() if t.weight).backward()
        optimizer.step()
        method.after_step(student)
    student.eval()
    found, errors = [], []
    for number in range(BATCHES):
        x, truth = noisy(number)
        found.append(student_statistics(student.hear(x), student.blank, 1, 0))
        errors.append(label_error_rate(propose(student, x).labels, truth))
    mean = {name: sum(each[name] for each in found) / BATCHES for name in found[0]}
    return mean | {"errors": sum(errors) / BATCHES}


def after(name, conf, seed=0, blank_bias=0.0):
    """One figure at the end of a run with these settings."""
    found = outcome(tuple(conf.items()), seed, blank_bias)
    return found.get(f"student_{name}", found.get(name))


def test_soft_labels_collapse_where_hard_ones_do_not():
    assert outcome(updates=0)["student_blank_share"] > 0.15
    assert after("blank_share", SOFT) < 0.01
    assert after("blank_share", {}) > 0.15
    assert after("errors", SOFT) > outcome(updates=0)["errors"] > after("errors", {})


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "conf",
    [
        SOFT | {"teacher": "ema", "decay": 0.99},
        SOFT | {"capacity": 20},
        {"hard": 0.5, "soft": 0.5},
        {"hard": 0.0, "sequences": 1.0},
        {"hard": 0.0, "sequences": 1.0, "hypotheses": "sampled"},
        {"label": "sampled"},
    ],
    ids=["moving average", "cache", "blend", "sequences", "sampled sequences", "sampled"],
)
def test_a_cure_leaves_fewer_errors_than_no_cure(conf, seed):
    assert after("errors", conf, seed) < after("errors", SOFT, seed) - 0.02


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sharpening_and_the_entropy_of_frames_make_surer_frames(seed):
    flat = after("frame_entropy", SOFT, seed)
    assert after("frame_entropy", SOFT | {"temperature": 0.5}, seed) < flat / 1.5
    assert after("frame_entropy", SOFT | {"frame_entropy": 0.5}, seed) < flat / 1.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_entropy_of_tokens_keeps_all_tokens_in_use(seed):
    with_bonus = after("token_entropy", SOFT | {"token_entropy": 0.5}, seed)
    assert with_bonus > after("token_entropy", SOFT, seed) + 0.1
    assert with_bonus > 0.95 * math.log(VOCABULARY)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_without_the_frames_of_the_blank_a_teacher_of_silence_is_not_followed(seed):
    silent = after("blank_share", SOFT, seed, blank_bias=3.0)
    assert after("blank_share", SOFT | {"blank_weight": 0.0}, seed, blank_bias=3.0) < silent - 0.2
