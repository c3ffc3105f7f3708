"""Joins FSDD's spoken digits to strings of 3-7 digits of one speaker.

Labelled speech is of three speakers; unlabelled, dev and test speech of the other three.  Each
recording occurs in one set only, there in several strings.  test and test_labelled_domain are of
the recordings 0-4, FSDD's official test set.  The first strings of train_labelled, and those of
one speaker, are sets too, for worse models.
"""

import argparse
import csv
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from espnet_pl.data import download, kaldi
from espnet_pl.data.kaldi import Utterance

RATE = 8000
WORDS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
URL = f"https://github.com/Jakobovski/free-spoken-digit-dataset/archive/{COMMIT}.tar.gz"
# download.pcm_digest of all 3000 recordings at that commit, by name without suffix.
DIGEST = "fbf77c5e2e80e5dacab77db4063117dc77b573a60babb054408d7d40fc993eb4"

LABELLED = ("george", "jackson", "lucas")
FEW = (250, 100, 30, 12)  # strings of the smaller labelled sets
UNLABELLED = ("nicolas", "theo", "yweweler")


@dataclass(frozen=True)
class Set:
    name: str
    speakers: tuple[str, ...]
    indices: range
    strings: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labelled_strings", type=int, default=500)
    parser.add_argument("--unlabelled_strings", type=int, default=620)
    parser.add_argument("--dev_strings", type=int, default=120)
    parser.add_argument("--test_strings", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sets = [
        Set("train_labelled", LABELLED, range(5, 50), args.labelled_strings),
        Set("train_unlabelled", UNLABELLED, range(8, 50), args.unlabelled_strings),
        Set("dev", UNLABELLED, range(5, 8), args.dev_strings),
        Set("test", UNLABELLED, range(5), args.test_strings),
        Set("test_labelled_domain", LABELLED, range(5), args.dev_strings),
    ]
    if min(s.strings for s in sets) < 1:
        parser.error("every set needs at least one string")

    audio, data = Path(os.environ.get("dumpdir") or "dump") / "audio", Path("data")
    given = [os.environ.get(key, "") for key in ("FSDD", "ESPNET_PL_SHARED")]
    parameters = {**vars(args), "audio": str(audio), "given": given}
    stamp = kaldi.Stamp(data / ".fsdd.stamp", parameters, [__file__, kaldi.__file__])
    parts = [*(f"train_labelled_{n}" for n in FEW), f"train_labelled_{LABELLED[0]}"]
    if stamp.is_current(data / name for name in [*(s.name for s in sets), "train_oracle", *parts]):
        print("fsdd: data/ is up to date")
        return
    stamp.clear()

    source = download.find_corpus("fsdd", _holds_fsdd, _fetch)
    digits = read_digits(source)
    missing = [k for s in sets for k in _recordings(s) if k not in digits]
    if missing:
        raise SystemExit(f"fsdd: {source} lacks {len(missing)} recordings, e.g. {missing[0]}")
    oracle = []
    for index, what in enumerate(sets):
        rng = np.random.default_rng([args.seed, index])
        utterances, used = _strings(what, digits, audio, rng)
        if what.name.startswith("train"):
            oracle += utterances
        if what.name == "train_labelled":
            alone = [u for u in utterances if u.speaker == LABELLED[0]]
            for name, own in zip(parts, [*(utterances[:n] for n in FEW), alone]):
                kaldi.write_dir(data / name, own)
                print(kaldi.summary(name, own), flush=True)
        print(kaldi.summary(what.name, utterances), flush=True)
        if what.name == "train_unlabelled":
            utterances = [u._replace(text=None) for u in utterances]
        kaldi.write_dir(data / what.name, utterances)
        kaldi.write_scp(data / what.name / "utt2recordings", used)
    kaldi.write_dir(data / "train_oracle", oracle)
    print(kaldi.summary("train_oracle", oracle))
    stamp.write()


def _holds_fsdd(folder: Path) -> bool:
    return (folder / "digits.tsv").is_file() or (folder / "recordings").is_dir()


def read_digits(folder: Path) -> dict[str, np.ndarray]:
    """``digit_speaker_index`` -> 16-bit samples [n] at 8 kHz, of either layout."""
    digits = {}
    if (folder / "digits.tsv").is_file():
        with open(folder / "digits.tsv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        whole = {path: _read(folder / path) for path in {row["path"] for row in rows}}
        for row in rows:
            speaker, digit, index = row["utt_id"].split("-")
            span = slice(int(row["start_sample"]), int(row["end_sample"]))
            digits[f"{digit}_{speaker}_{int(index)}"] = whole[row["path"]][span]
    else:
        for path in sorted((folder / "recordings").glob("[0-9]_*_*.wav")):
            digits[path.stem] = _read(path)
    return digits


def _read(path):
    samples, rate = soundfile.read(path, dtype="int16")
    if rate != RATE or samples.ndim != 1:
        raise SystemExit(f"fsdd: {path} is not mono at {RATE} Hz")
    return samples


def _fetch() -> Path:
    folder = Path("downloads") / "fsdd"
    if _holds_fsdd(folder):
        return folder
    url = os.environ.get("FSDD_URL", URL)
    archive, fresh = folder.with_suffix(".tar.gz"), folder.with_name(".fsdd.tmp")
    if not archive.exists():
        download.download(url, archive)

    def wanted(name: str) -> str | None:
        match = re.search(r"/(recordings/\d_[a-z]+_\d+\.wav|README\.md)$", name)
        return match and match[1]

    shutil.rmtree(fresh, ignore_errors=True)
    download.unpack(archive, fresh, wanted)
    digest = download.pcm_digest(read_digits(fresh)) if _holds_fsdd(fresh) else "nothing"
    expected = os.environ.get("FSDD_SHA256", DIGEST)
    archive.unlink()
    if digest != expected:
        shutil.rmtree(fresh, ignore_errors=True)
        raise SystemExit(f"fsdd: {url} holds other recordings: {digest}, not {expected}")
    os.replace(fresh, folder)
    return folder


def _recordings(what: Set) -> list[str]:
    return [f"{d}_{s}_{i}" for s in what.speakers for d in range(10) for i in what.indices]


def _strings(what, digits, audio, rng):
    """The utterances of one set, and the names of the recordings in each; writes the audio."""
    shutil.rmtree(audio / what.name, ignore_errors=True)
    decks: dict[str, list[str]] = {speaker: [] for speaker in what.speakers}
    utterances, used = [], {}
    for number in range(what.strings):
        speaker = what.speakers[number % len(what.speakers)]
        deck, hand = decks[speaker], []
        for _ in range(rng.integers(3, 8)):
            if not deck:  # every recording is used before one is used again
                mine = [name for name in _recordings(what) if name.split("_")[1] == speaker]
                deck.extend(rng.permutation(mine).tolist())
            hand.append(deck.pop())
        key = f"{speaker}-{what.name}-{number:05d}"
        path = audio / what.name / f"{key}.flac"
        kaldi.write_audio(path, join([digits[name] for name in hand], rng), RATE)
        text = " ".join(WORDS[int(name[0])] for name in hand)
        utterances.append(Utterance(key, speaker, str(path), text))
        used[key] = " ".join(hand)
    return utterances, used


def join(digits: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Digits (16-bit, [n] each) with pauses of 50-300 ms between and around them; float [n].

    The recordings are cut tight.  Digital silence between them would tell a recogniser where
    words begin, so noise as loud as the quietest 10 ms lies under everything and the cut edges
    fade into it over 5 ms.
    """
    frame, ramp = RATE // 100, np.linspace(0, 1, RATE // 200)
    pieces, quietest = [], []
    for digit in digits:
        sound = digit.astype(np.float64) / 32768
        frames = sound[: len(sound) // frame * frame].reshape(-1, frame)
        quietest.append(np.sqrt(np.mean(frames**2, axis=1)).min())
        sound[: len(ramp)] *= ramp
        sound[-len(ramp) :] *= ramp[::-1]
        pieces += [np.zeros(round(rng.uniform(0.05, 0.3) * RATE)), sound]
    pieces.append(np.zeros(round(rng.uniform(0.05, 0.3) * RATE)))
    speech = np.concatenate(pieces)
    floor = max(np.median(quietest), 1 / 32768)
    return np.clip(speech + floor * rng.standard_normal(len(speech)), -1, 1)


if __name__ == "__main__":
    main()
