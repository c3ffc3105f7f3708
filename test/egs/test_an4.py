"""egs/an4/pl1/local: where the speech comes from, its splits, its generated texts."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile

from espnet_pl.data.synthesis import CLOSED_CLASSES
from test.egs.corpora import (
    SHARED,
    SMALL,
    copy_recipe,
    data_sh,
    made_by_data_sh,
    needs_speech,
    pack,
    read,
    serving,
    speakers,
)


def lay_out_like_cmu(source, folder, suffix):
    """The repack as the CMU archive: wav/an4_clstk/<speaker>/*, etc/an4_train.transcription ..."""
    options = {"format": "NIST", "endian": "BIG"} if suffix == "sph" else {"format": "WAV"}
    (folder / "etc").mkdir(parents=True)
    with open(source / "manifest.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    for part, top in (("train", "an4_clstk"), ("test", "an4test_clstk")):
        ids, texts = [], []
        for row in (row for row in rows if row["official"] == part):
            stem = Path(row["path"]).stem
            ids.append(f"{top}/{row['speaker']}/{stem}\n")
            marked = f"<s> {row['text']} </s>" if part == "train" else row["text"]
            texts.append(f"{marked} ({stem})\n")
            path = folder / "wav" / top / row["speaker"] / f"{stem}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            samples, rate = soundfile.read(source / row["path"], dtype="int16")
            soundfile.write(path, samples, rate, subtype="PCM_16", **options)
        (folder / f"etc/an4_{part}.fileids").write_text("".join(ids))
        (folder / f"etc/an4_{part}.transcription").write_text("".join(texts))


def assert_same_but_for_its_source(one, other):
    stamp = "data/.an4.stamp"
    (a, b) = ({k: v for k, v in made_by_data_sh(f).items() if k != stamp} for f in (one, other))
    assert a == b


@needs_speech
def test_an4_sphere_archive_gives_the_same_corpus(make, tmp_path):
    folder = make("an4")
    lay_out_like_cmu(Path(SHARED) / "data/an4", tmp_path / "cmu", "sph")
    again = copy_recipe("an4", tmp_path / "recipe")
    status, _, err = data_sh(again, SMALL["an4"], AN4=str(tmp_path / "cmu"))
    assert status == 0, err
    assert_same_but_for_its_source(again, folder)


@needs_speech
def test_an4_checked_download_of_wav_files_gives_the_same_corpus(make, tmp_path):
    folder = make("an4")
    lay_out_like_cmu(Path(SHARED) / "data/an4", tmp_path / "cmu", "wav")
    (tmp_path / "www").mkdir()
    pack(tmp_path / "cmu", tmp_path / "www/an4.tar.gz")
    again = copy_recipe("an4", tmp_path / "recipe")
    with serving(tmp_path / "www") as url:
        status, _, err = data_sh(again, SMALL["an4"], AN4="downloads", AN4_URL=f"{url}/an4.tar.gz")
    assert status == 0, err
    assert_same_but_for_its_source(again, folder)


@needs_speech
def test_an4_splits_are_those_documented(make, tmp_path):
    folder = make("an4")

    def size(name, folder=folder):
        oracle = {u.id: u.text for u in read(folder, "train_oracle")}
        utterances = read(folder, name)
        words = sum(len((u.text or oracle[u.id]).split()) for u in utterances)
        seconds = sum(soundfile.info(folder / u.wav).duration for u in utterances)
        return len({u.speaker for u in utterances}), len(utterances), round(seconds / 60, 1), words

    assert size("train_labelled") == (7, 87, 3.5, 457)
    assert size("train_unlabelled") == (47, 604, 28.1, 3553)
    assert size("dev") == (10, 130, 5.6, 708)
    assert size("test") == (10, 130, 6.0, 773)
    assert size("test_ext") == (10, 127, 5.3, 724)
    real = read(folder, "train_labelled") + read(folder, "train_labelled_speed")
    assert read(folder, "train_labelled_real") == sorted(real)
    for few in (7, 21):  # of all seven speakers, each at three speeds
        some = read(folder, f"train_labelled_{few}")
        assert len(some) == 3 * few and {u.id for u in some} < {u.id for u in real}
        assert len({u.speaker.rpartition("-")[2] for u in some}) == 7
    plus = real + read(folder, "train_labelled_generated")
    assert read(folder, "train_labelled_plus") == sorted(plus)
    unlabelled = read(folder, "train_unlabelled") + read(folder, "train_unlabelled_speed")
    assert read(folder, "train_unlabelled_real") == sorted(unlabelled)

    more = copy_recipe("an4", tmp_path / "recipe")
    status, _, err = data_sh(more, f"{SMALL['an4']} --labelled_speakers 14")
    assert status == 0, err
    assert size("train_labelled", more) == (14, 178, 7.7, 992)
    assert size("train_unlabelled", more) == (40, 513, 23.9, 3018)
    assert speakers(folder, "train_labelled") < speakers(more, "train_labelled")
    for name in ("dev", "test", "test_ext"):
        assert speakers(folder, name) == speakers(more, name)


@needs_speech
def test_an4_speed_copies_last_longer_and_shorter_with_the_pitch_along(make):
    folder = make("an4")
    original = {u.id: u for u in read(folder, "train_labelled")}
    copies = read(folder, "train_labelled_speed")
    assert len(copies) == 2 * len(original)

    def heard(utterance, speed):  # seconds, and the mean frequency of 100 to 6500 Hz at speed 1
        samples, rate = soundfile.read(folder / utterance.wav)
        frequencies = np.fft.rfftfreq(len(samples), 1 / rate)
        power = np.abs(np.fft.rfft(samples)) ** 2
        power[(frequencies < 100 * speed) | (frequencies > 6500 * speed)] = 0
        return len(samples) / rate, power @ frequencies / power.sum()

    for copy in copies[::20]:
        prefix, name = copy.id.split("-", 1)
        speed = float(prefix.removeprefix("sp"))
        assert speed in (0.9, 1.1) and copy.speaker == f"{prefix}-{original[name].speaker}"
        assert copy.text == original[name].text
        seconds, frequency = heard(copy, speed)
        seconds_before, frequency_before = heard(original[name], 1)
        assert seconds == pytest.approx(seconds_before / speed, rel=1e-3)
        assert frequency == pytest.approx(frequency_before * speed, rel=0.01)


@needs_speech
def test_an4_generated_texts_use_no_word_of_held_out_speech(make):
    folder = make("an4")
    known = {word for u in read(folder, "train_labelled") for word in u.text.split()}
    generated = {w for u in read(folder, "train_labelled_generated") for w in u.text.split()}
    assert generated <= known | CLOSED_CLASSES
