"""Lays AN4 out as labelled, unlabelled, dev and test sets, and generates more labelled speech.

``splits.tsv`` says which speaker belongs to which set; ``test`` is AN4's own test set.  Those of
``train_labelled_more`` join the unlabelled speakers, or the labelled ones if 14 are asked for.

``train_labelled_speed`` and ``train_unlabelled_speed`` are the same played slower and faster.
``train_labelled_generated`` has AN4's grammar in voices of eSpeak NG, close to the microphone.
``train_labelled_real`` and ``train_unlabelled_real`` are the recordings at all speeds, and
``train_labelled_plus`` has the generated speech too.  ``train_labelled_21`` and ``_7`` are so many
recordings, of all speakers by turns, at all speeds: for worse models.
"""

import argparse
import csv
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from espnet_pl.data import download, kaldi, synthesis
from espnet_pl.data.kaldi import Utterance
from espnet_pl.data.synthesis import Room, Voice

RATE = 16000
COMMIT = "b567d132f43304e70a2b2eca6077f22255311812"
URL = f"https://github.com/cmusphinx/an4/archive/{COMMIT}.tar.gz"
# download.pcm_digest of the 1078 recordings at that commit, by utterance id.
DIGEST = "5e08ef435eb7194ac08af777710b6787230e802299420664b5cb19995993dcac"
SPEEDS = ("0.9", "1.1")  # Kaldi's three-way speed perturbation; the third is 1
FEW = (21, 7)  # 3 % and 1 % of the recordings to train with
DERIVED = (  # the sets that splits.tsv does not name
    "train_labelled_speed", "train_labelled_real", "train_labelled_generated",
    "train_labelled_plus", "train_unlabelled_speed", "train_unlabelled_real", "train_oracle",
    *(f"train_labelled_{n}" for n in FEW),
)  # fmt: skip
SPLITS = Path(__file__).with_name("splits.tsv")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labelled_speakers", type=int, choices=(7, 14), default=7)
    parser.add_argument("--generated_minutes", type=float, default=40)
    parser.add_argument("--generated_speakers", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.generated_minutes <= 0 or not 2 <= args.generated_speakers <= 190:
        parser.error("need more than 0 generated minutes and 2 to 190 generated speakers")

    audio, data = Path(os.environ.get("dumpdir") or "dump") / "audio", Path("data")
    given = [os.environ.get(key, "") for key in ("AN4", "ESPNET_PL_SHARED")]
    parameters = {**vars(args), "audio": str(audio), "given": given}
    sources = [__file__, SPLITS, kaldi.__file__, synthesis.__file__]
    stamp = kaldi.Stamp(data / ".an4.stamp", parameters, sources)
    splits: dict[str, set[str]] = {}
    for line in SPLITS.read_text().splitlines()[1:]:
        speaker, name = line.split("\t")
        splits.setdefault(name, set()).add(speaker)
    joined = "train_labelled" if args.labelled_speakers == 14 else "train_unlabelled"
    splits[joined] |= splits.pop("train_labelled_more")
    if stamp.is_current(data / name for name in [*splits, *DERIVED]):
        print("an4: data/ is up to date")
        return
    stamp.clear()

    source = download.find_corpus("an4", lambda f: _layout(f) is not None, _fetch)
    everything = _convert(read_corpus(source), audio)
    unknown = {u.speaker for u in everything} ^ set().union(*splits.values())
    if unknown:
        raise SystemExit(f"an4: {source} and splits.tsv differ in speakers {sorted(unknown)}")
    sets = {n: [u for u in everything if u.speaker in who] for n, who in splits.items()}
    for name in ("train_labelled", "train_unlabelled"):
        sets[f"{name}_speed"] = _change_speed(sets[name], audio / f"{name}_speed")
        sets[f"{name}_real"] = sets[name] + sets[f"{name}_speed"]
    for n in FEW:
        few = [u.id for u in _by_turns(sets["train_labelled"])[:n]]
        names = {*few, *(f"sp{speed}-{name}" for speed in SPEEDS for name in few)}
        sets[f"train_labelled_{n}"] = [u for u in sets["train_labelled_real"] if u.id in names]
    generated = _generate(sets["train_labelled"], audio / "train_labelled_generated", args)
    sets["train_labelled_generated"] = generated
    sets["train_labelled_plus"] = sets["train_labelled_real"] + generated
    sets["train_oracle"] = sets["train_labelled_real"] + sets["train_unlabelled_real"]
    for name, utterances in sets.items():
        print(kaldi.summary(name, utterances), flush=True)
        if name.startswith("train_unlabelled"):
            utterances = [u._replace(text=None) for u in utterances]
        kaldi.write_dir(data / name, utterances)
    stamp.write()


# --- the real corpus ----------------------------------------------------------------------------


def _layout(folder: Path) -> str | None:
    if (folder / "manifest.tsv").is_file():
        return "manifest"
    if (folder / "etc/an4_train.fileids").is_file() and (folder / "wav").is_dir():
        return "cmu"
    return None


def read_corpus(folder: Path) -> list[Utterance]:
    """All utterances, with the audio files of the given layout."""
    if _layout(folder) == "manifest":
        with open(folder / "manifest.tsv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return [
            Utterance(row["utt_id"], row["speaker"], str(folder / row["path"]), row["text"])
            for row in rows
        ]
    return [u for part in ("train", "test") for u in _read_cmu(folder, part)]


def _read_cmu(folder, part):
    """``<s> YES </s> (an1-fash-b)`` or, in the test set, ``YES (an1-fash-b)``."""
    texts = {}
    for line in (folder / f"etc/an4_{part}.transcription").read_text("utf-8").splitlines():
        match = re.fullmatch(r"(?:<s>)?\s*(.+?)\s*(?:</s>)?\s*\(([^()\s]+)\)\s*", line)
        if match:
            texts[match[2]] = " ".join(match[1].upper().split())
    for line in (folder / f"etc/an4_{part}.fileids").read_text("utf-8").splitlines():
        if not line.strip():
            continue
        stem = folder / "wav" / line.strip()
        found = [p for s in (".wav", ".sph") if (p := stem.with_name(stem.name + s)).is_file()]
        if not found or stem.name not in texts:
            what = "transcription" if found else "wav or sph file"
            raise SystemExit(f"an4: no {what} for {line.strip()} in {folder}")
        speaker = stem.parent.name
        yield Utterance(f"{speaker}-{stem.name}", speaker, str(found[0]), texts[stem.name])


def _read(path) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="int16")
    if rate != RATE or samples.ndim != 1:
        raise SystemExit(f"an4: {path} is not mono at {RATE} Hz")
    return samples


def _convert(utterances, audio):
    shutil.rmtree(audio / "an4", ignore_errors=True)
    converted = []
    for utterance in utterances:
        path = audio / "an4" / utterance.speaker / f"{utterance.id}.flac"
        kaldi.write_audio(path, _read(utterance.wav), RATE)
        converted.append(utterance._replace(wav=str(path)))
    return converted


def _fetch() -> Path:
    folder = Path("downloads") / "an4"
    if _layout(folder):
        return folder
    url = os.environ.get("AN4_URL", URL)
    archive, fresh = folder.with_suffix(".tar.gz"), folder.with_name(".an4.tmp")
    if not archive.exists():
        download.download(url, archive)

    def wanted(name: str) -> str | None:
        match = re.search(
            r"/(wav/an4(?:test)?_clstk/\w+/[\w-]+\.(?:wav|sph)"
            r"|etc/an4_\w+\.(?:fileids|transcription)|LICENSE|README\.md)$",
            name,
        )
        return match and match[1]

    shutil.rmtree(fresh, ignore_errors=True)
    download.unpack(archive, fresh, wanted)
    archive.unlink()
    digest = "nothing"
    if _layout(fresh):
        digest = download.pcm_digest({u.id: _read(u.wav) for u in read_corpus(fresh)})
    expected = os.environ.get("AN4_SHA256", DIGEST)
    if digest != expected:
        shutil.rmtree(fresh, ignore_errors=True)
        raise SystemExit(f"an4: {url} holds other recordings: {digest}, not {expected}")
    os.replace(fresh, folder)
    return folder


# --- speech made of other speech, or of text -----------------------------------------------------


def _change_speed(labelled, folder) -> list[Utterance]:
    """Every utterance at every speed, by resampling: pitch and formants go along with the tempo."""
    shutil.rmtree(folder, ignore_errors=True)
    changed = []
    for speed in SPEEDS:
        step = 1 / Fraction(speed)
        for utterance in labelled:
            samples = _read(utterance.wav) / 32768
            samples = resample_poly(samples, step.numerator, step.denominator).clip(-1, 1)
            key, speaker = f"sp{speed}-{utterance.id}", f"sp{speed}-{utterance.speaker}"
            path = folder / f"{key}.flac"
            kaldi.write_audio(path, samples, RATE)
            changed.append(Utterance(key, speaker, str(path), utterance.text))
    return changed


def _by_turns(utterances) -> list[Utterance]:
    """The first utterance of each speaker, then the second of each, and so on."""
    turn = dict.fromkeys((u.speaker for u in utterances), 0)
    turns = []
    for utterance in utterances:
        turns.append((turn[utterance.speaker], utterance.speaker, utterance))
        turn[utterance.speaker] += 1
    return [utterance for *_, utterance in sorted(turns, key=lambda item: item[:2])]


def _generate(labelled, folder, args) -> list[Utterance]:
    """Speech of AN4's grammar: one text in three is a labelled transcript, two are made up."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(args.seed)
    known = synthesis.CLOSED_CLASSES | {word for u in labelled for word in u.text.split()}
    people = _voices(args.generated_speakers, rng)
    utterances, samples = [], 0
    while samples < args.generated_minutes * 60 * RATE:
        voice = people[len(utterances) % len(people)]
        words = synthesis.random_sentence(rng)
        if rng.random() < 1 / 3:
            words = labelled[rng.integers(len(labelled))].text.split()
        if not known.issuperset(words):
            continue
        room = Room(
            t60=rng.uniform(0.05, 0.25),
            distance=rng.uniform(-18, -8),
            snr=rng.uniform(18, 40),
            noise_slope=rng.uniform(-6, 0),
            tilt=rng.uniform(-4, 0),
            level=rng.uniform(-32, -22),
        )
        speech = synthesis.speak(words, voice, RATE, rng)
        speech = synthesis.record(speech, room, RATE, rng)
        samples += len(speech)
        speaker = f"generated_{voice.accent}_{voice.variant}"
        key = f"{speaker}-{len(utterances):05d}"
        path = folder / f"{key}.flac"
        kaldi.write_audio(path, speech, RATE)
        utterances.append(Utterance(key, speaker, str(path), " ".join(words)))
    return utterances


def _voices(count: int, rng) -> list[Voice]:
    """Voices of as many speakers, four in five American like AN4's."""
    pairs = [(accent, variant) for accent in synthesis.ACCENTS for variant in synthesis.VARIANTS]
    rng.shuffle(pairs)
    american = [pair for pair in pairs if pair[0].startswith("en-us")]
    other = [pair for pair in pairs if not pair[0].startswith("en-us")]
    chosen = american[: round(0.8 * count)]
    chosen += other[: count - len(chosen)]
    rng.shuffle(chosen)
    return [
        Voice(
            accent,
            variant,
            pitch=int(rng.integers(25, 80)),
            speed=rng.uniform(125, 185),
            pause=rng.uniform(0.03, 0.2),
            warp=rng.uniform(0.88, 1.14),
        )
        for accent, variant in chosen
    ]


if __name__ == "__main__":
    main()
