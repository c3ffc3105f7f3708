r"""Weak and strong views of the same utterances: played slower or faster.

    speed s:  x_s(t) = x(s · t),   ⌈N / s⌉ samples instead of N

by resampling, so that pitch and formants move with the tempo: 1.1 is a shorter vocal tract
speaking faster, 0.9 a longer one speaking more slowly.  SpecAugment and dropout, the other half of
the strong view, are inside the student.

Source: Ko, Povey, Peddinti, Khudanpur, "Audio Augmentation for Speech Recognition", Interspeech
2015 (speeds 0.9, 1.0 and 1.1); the resampling is torchaudio.functional.resample.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torchaudio.functional import resample

Speech = TypeVar("Speech")  # a dataclass with ``speech`` (n, samples) and ``speech_lengths`` (n,)


def at_speed(x: Speech, factor: float) -> Speech:
    """The same utterances at another speed; 1 gives x itself.

    Raises:
        ValueError: speech that is not one waveform per utterance, or a speed below 1/1000.
    """
    if factor == 1:
        return x
    if x.speech.dim() != 2:
        raise ValueError(
            f"speech of shape {tuple(x.speech.shape)}: only waveforms, (utterances, samples), can "
            "be played at another speed; train from waveforms, or leave every speed at 1"
        )
    ratio = Fraction(factor).limit_denominator(1000)
    if ratio <= 0:
        raise ValueError(f"speed {factor}: it must be positive")
    speech = resample(x.speech, ratio.numerator, ratio.denominator)
    lengths = -(-x.speech_lengths * ratio.denominator // ratio.numerator)  # rounded up
    return dataclasses.replace(x, speech=speech, speech_lengths=lengths)


def draw(speeds: Sequence[float]) -> float:
    """One of the speeds, all equally likely, by torch's random numbers."""
    return speeds[int(torch.randint(len(speeds), ()))] if len(speeds) > 1 else speeds[0]
