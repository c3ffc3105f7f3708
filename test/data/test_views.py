"""data/views: the same utterances, slower or faster."""

import numpy as np
import pytest
import torch

from espnet_pl.data.views import at_speed, draw
from espnet_pl.methods.base import Utterances

RATE = 8000


def tone(hertz, samples=(8000, 5000)):
    speech = torch.zeros(len(samples), max(samples))
    for row, n in zip(speech, samples):
        row[:n] = torch.sin(2 * np.pi * hertz * torch.arange(n) / RATE)
    return Utterances([f"u{i}" for i in range(len(samples))], speech, torch.tensor(samples))


def pitch(row):
    spectrum = torch.fft.rfft(row, n=16 * RATE).abs()
    return spectrum.argmax().item() / 16


@pytest.mark.parametrize("factor", [0.5, 0.85, 0.9, 1.05, 1.15, 2.0])
def test_tempo_and_pitch_change_together(factor):
    x = tone(400)
    y = at_speed(x, factor)
    assert y.speech_lengths.tolist() == [int(np.ceil(n / factor)) for n in (8000, 5000)]
    assert y.speech.shape == (2, y.speech_lengths[0])
    for row, n in zip(y.speech, y.speech_lengths):
        assert pitch(row[:n]) == pytest.approx(400 * factor, rel=0.005)
        assert row[:n].abs().max() == pytest.approx(1, abs=0.1)
    assert y.speech[1, y.speech_lengths[1] + 50 :].abs().max() < 0.01
    assert y.utt_id == x.utt_id


def test_fast_speech_does_not_alias():
    """3.5 kHz would be 5.25 kHz, which 8000 samples a second cannot carry."""
    assert at_speed(tone(3500), 1.5).speech.abs()[:, 100:-100].max() < 0.1


def test_speed_1_is_the_very_same():
    x = tone(400)
    assert at_speed(x, 1) is x and at_speed(x, 1.0) is x


def test_there_and_back():
    x = tone(400)
    back = at_speed(at_speed(x, 0.8), 1.25)
    assert torch.equal(back.speech_lengths, x.speech_lengths)
    assert (back.speech - x.speech)[0, 50:-50].abs().max() < 0.02


@pytest.mark.parametrize("factor", [0.0, -1.0, 1e-4])
def test_impossible_speeds(factor):
    with pytest.raises(ValueError, match="must be positive"):
        at_speed(tone(400), factor)


def test_features_cannot_be_played():
    x = Utterances(["u"], torch.zeros(1, 10, 80), torch.tensor([10]))
    with pytest.raises(ValueError, match=r"shape \(1, 10, 80\).*waveforms"):
        at_speed(x, 0.9)
    assert at_speed(x, 1.0) is x


def test_every_speed_is_drawn_and_the_seed_decides():
    torch.manual_seed(0)
    first = [draw((0.9, 1.0, 1.1)) for _ in range(60)]
    torch.manual_seed(0)
    assert first == [draw([0.9, 1.0, 1.1]) for _ in range(60)]
    assert all(10 < first.count(s) < 30 for s in (0.9, 1.0, 1.1))


def test_one_speed_takes_no_random_number():
    before = torch.get_rng_state()
    assert draw((0.9,)) == 0.9
    assert torch.equal(before, torch.get_rng_state())
