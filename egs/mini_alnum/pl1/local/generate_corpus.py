"""Generates mini_alnum: little labelled speech of one domain, much unlabelled speech of another.

The same voices speak in both.  Domain A (labelled): nearly clean.  Domain B (unlabelled, dev,
test): every speaker in a room of their own, with noise.  ``--shift`` scales the difference: 0 is
A's room, 1 is T60 0.15-0.5 s and noise from 20 dB below the speech to 5 dB above it.

Why not other voices: an engine says a word the same way each time, so what a recogniser gets wrong
about an unknown voice it gets wrong always, and pseudo-labels cannot mend that.  Noise differs from
one recording to the next.
"""

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from espnet_pl.data import kaldi, synthesis
from espnet_pl.data.kaldi import Utterance
from espnet_pl.data.synthesis import Room, Voice

SPEAKERS = 24


@dataclass(frozen=True)
class Set:
    name: str
    domain: str
    minutes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labelled_minutes", type=float, default=30)
    parser.add_argument("--unlabelled_minutes", type=float, default=45)
    parser.add_argument("--dev_minutes", type=float, default=4)
    parser.add_argument("--test_minutes", type=float, default=13)
    parser.add_argument("--shift", type=float, default=1.0, help="from domain A to B, 0 to 2")
    parser.add_argument("--rate", type=int, default=8000, help="samples per second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Held-out sets come first: the training sets then avoid their texts.
    sets = [
        Set("test", "B", args.test_minutes),
        Set("dev", "B", args.dev_minutes),
        Set("test_labelled_domain", "A", args.dev_minutes),
        Set("train_labelled", "A", args.labelled_minutes),
        Set("train_unlabelled", "B", args.unlabelled_minutes),
    ]
    if not 0 <= args.shift <= 2 or min(s.minutes for s in sets) <= 0 or args.rate < 4000:
        parser.error("need 0 <= shift <= 2, more than 0 minutes of each set, rate >= 4000")

    audio = Path(os.environ.get("dumpdir") or "dump") / "audio"
    data = Path("data")
    parameters = {**vars(args), "audio": str(audio)}
    sources = [__file__, kaldi.__file__, synthesis.__file__]
    stamp = kaldi.Stamp(data / ".mini_alnum.stamp", parameters, sources)
    names = [s.name for s in sets] + ["train_oracle"]
    if stamp.is_current(data / name for name in names):
        print("mini_alnum: data/ is up to date")
        return
    stamp.clear()

    cast = _cast(np.random.default_rng(args.seed))
    seen: set[str] = set()
    made = {}
    for index, what in enumerate(sets):
        made[what.name] = _generate(what, index, cast, args, audio, seen)
        print(kaldi.summary(what.name, made[what.name]), flush=True)
    for name, utterances in made.items():
        hidden = name == "train_unlabelled"
        kaldi.write_dir(data / name, [u._replace(text=None) if hidden else u for u in utterances])
    oracle = made["train_labelled"] + made["train_unlabelled"]
    kaldi.write_dir(data / "train_oracle", oracle)
    print(kaldi.summary("train_oracle", oracle))
    stamp.write()


def _cast(rng):
    """(accent, variant) of the speakers; the same ones in all sets."""
    pool = [(accent, variant) for accent in synthesis.ACCENTS for variant in synthesis.VARIANTS]
    rng.shuffle(pool)
    return pool[:SPEAKERS]


def _speaker(accent, variant, domain, shift, rng):
    """A voice and, for its owner always speaks in the same room, a room without noise."""
    voice = Voice(
        accent,
        variant,
        pitch=int(rng.integers(35, 66)),
        speed=rng.uniform(130, 165),
        pause=0.08,
        warp=rng.uniform(0.97, 1.03),
    )
    if domain == "A":
        return voice, Room()
    room = Room(
        t60=shift * rng.uniform(0.15, 0.5),
        distance=rng.uniform(-10, -3),
        noise_slope=rng.uniform(-6, 0),
        tilt=shift * rng.uniform(-2, 2),
    )
    return voice, room


# Letters that a small model tells apart after minutes; B, D, E, P, T, … take it hours.
LETTERS = "FHIJLOQRUWXY"
CONTROL = (*synthesis.BEFORE, *synthesis.ALONE)


def _sentence(rng):
    """A string, as upper-case words: a control word or none, then digits, a date, or letters.

    Long enough for the time masks of the strong view to leave something of it.
    """

    def some(items, least, most):
        return [items[i] for i in rng.integers(len(items), size=rng.integers(least, most + 1))]

    words, kind = some(CONTROL, 0, 1), rng.random()
    if kind < 0.4:
        return words + some(synthesis.DIGITS, 3, 7)
    if kind < 0.7:
        words += some(synthesis.MONTHS, 1, 1) + some(synthesis.ORDINALS[:12], 1, 1)
        return words + some(synthesis.DIGITS, 2, 4)
    return words + some(LETTERS, 1, 3) + some(synthesis.DIGITS, 2, 4)


def _generate(what, index, cast, args, audio, seen):
    """The utterances of one set, speakers in turn until it is long enough; writes the audio."""
    shutil.rmtree(audio / what.name, ignore_errors=True)
    rng = np.random.default_rng([args.seed, index])
    # A speaker has the same voice in all sets, and in those of a domain the same room.
    people = [
        _speaker(*pair, what.domain, args.shift, np.random.default_rng([args.seed, 100, i]))
        for i, pair in enumerate(cast)
    ]
    held_out = not what.name.startswith("train")
    shift = args.shift if what.domain == "B" else 0.0
    utterances, samples = [], 0
    while samples < what.minutes * 60 * args.rate:
        number = len(utterances)
        (accent, variant), (voice, room) = cast[number % len(cast)], people[number % len(cast)]
        words = _sentence(rng)
        # A lone control word cannot be kept out of training: there are seven.
        while not held_out and len(words) > 1 and " ".join(words) in seen:
            words = _sentence(rng)
        snr = rng.uniform(35 - 40 * shift, 45 - 25 * shift)
        room = Room(**{**vars(room), "snr": snr, "level": rng.uniform(-30, -22)})
        speech = synthesis.speak(words, voice, args.rate, rng)
        speech = synthesis.record(speech, room, args.rate, rng)
        samples += len(speech)

        text, speaker = " ".join(words), f"{accent}_{variant}"
        if held_out:
            seen.add(text)
        key = f"{speaker}-{what.domain}{index}{number:04d}"  # a speaker is in several sets
        path = audio / what.name / f"{key}.flac"
        kaldi.write_audio(path, speech, args.rate)
        utterances.append(Utterance(key, speaker, str(path), text))
    return utterances


if __name__ == "__main__":
    main()
