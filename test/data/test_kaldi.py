"""data/kaldi: sorted, complete or absent, refused by name; stamps; audio."""

import os

import numpy as np
import pytest
import soundfile

from espnet_pl.data import kaldi
from espnet_pl.data.kaldi import Utterance


def utterances(folder, count=3, text="YES"):
    made = []
    for number in reversed(range(count)):
        path = folder / f"{number}.flac"
        kaldi.write_audio(path, np.linspace(-0.5, 0.5, 800), 8000)
        made.append(Utterance(f"s{number % 2}-{number}", f"s{number % 2}", str(path), text))
    return made


def test_a_directory_is_sorted_and_reads_back(tmp_path):
    made = utterances(tmp_path, 12)
    kaldi.write_dir(tmp_path / "set", made)
    assert kaldi.read_dir(tmp_path / "set") == sorted(made)
    for name in ("wav.scp", "text", "utt2spk", "spk2utt"):
        keys = [line.split(b" ")[0] for line in (tmp_path / "set" / name).open("rb")]
        assert keys == sorted(keys)  # bytes: the C locale
    assert kaldi.read_scp(tmp_path / "set/spk2utt")["s1"].split() == sorted(
        u.id for u in made if u.speaker == "s1"
    )


def test_without_transcripts_there_is_no_text_not_even_an_old_one(tmp_path):
    made = utterances(tmp_path)
    kaldi.write_dir(tmp_path / "set", made)
    (tmp_path / "set/utt2num_samples").write_text("stale 1\n")
    kaldi.write_dir(tmp_path / "set", [u._replace(text=None) for u in made])
    assert sorted(os.listdir(tmp_path / "set")) == ["spk2utt", "utt2spk", "wav.scp"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: [u[0], u[0]], "occurs twice"),
        (lambda u: [u[0]._replace(text=None), u[1]], "2 utterances, 1 with"),
        (lambda u: [u[0]._replace(id="s0 1")], "one word"),
        (lambda u: [u[0]._replace(speaker="t")], "starting with 't'"),
        (lambda u: [], "0 utterances"),
    ],
)
def test_a_bad_directory_is_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        kaldi.write_dir(tmp_path / "set", change(utterances(tmp_path)))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("line", "message"), [("a", "nothing after"), ("b 2", "twice")])
def test_a_bad_list_names_file_and_line(tmp_path, line, message):
    (tmp_path / "x").write_text(f"b 1\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"x:3: .*{message}"):
        kaldi.read_scp(tmp_path / "x")


@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_audio_keeps_its_16_bit_samples(tmp_path, suffix):
    samples = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.int16)
    path = tmp_path / f"a.{suffix}"
    kaldi.write_audio(path, samples, 8000)
    read, rate = soundfile.read(path, dtype="int16")
    assert rate == 8000
    assert soundfile.info(path).subtype == "PCM_16"
    np.testing.assert_array_equal(read, samples)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "samples", [[], [np.nan], [1.5], np.zeros((2, 2))], ids=["empty", "nan", "loud", "stereo"]
)
def test_bad_audio_is_refused(tmp_path, samples):
    with pytest.raises(ValueError, match="a.wav"):
        kaldi.write_audio(tmp_path / "a.wav", np.asarray(samples, dtype=float), 8000)
    assert not os.listdir(tmp_path)


def test_a_stamp_covers_parameters_code_and_audio(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("1")
    made = utterances(tmp_path)
    kaldi.write_dir(tmp_path / "set", made)

    def stamp(**parameters):
        return kaldi.Stamp(tmp_path / ".stamp", parameters, [code])

    sets = [tmp_path / "set"]
    assert not stamp(seed=0).is_current(sets)
    stamp(seed=0).write()
    assert stamp(seed=0).is_current(sets)
    assert not stamp(seed=1).is_current(sets)
    code.write_text("2")
    assert not stamp(seed=0).is_current(sets)
    code.write_text("1")
    os.unlink(made[0].wav)
    assert not stamp(seed=0).is_current(sets)
