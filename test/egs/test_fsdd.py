"""egs/fsdd/pl1/local: where the digits come from, and how they are joined."""

import shutil
from pathlib import Path

import numpy as np
import soundfile

from espnet_pl.data import download, kaldi
from test.egs.corpora import (
    SHARED,
    SMALL,
    copy_recipe,
    data_sh,
    load,
    needs_speech,
    pack,
    read,
    serving,
)


def fake_fsdd(folder):
    """FSDD's layout with 3000 short noises; returns their digest."""
    rng, digits = np.random.default_rng(0), {}
    (folder / "recordings").mkdir(parents=True)
    for speaker in ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"):
        for digit in range(10):
            for index in range(50):
                name = f"{digit}_{speaker}_{index}"
                samples = rng.integers(-3000, 3000, 1200 + 8 * index).astype(np.int16)
                soundfile.write(folder / f"recordings/{name}.wav", samples, 8000)
                digits[name] = samples
    return download.pcm_digest(digits)


def test_fsdd_download(tmp_path):
    digest = fake_fsdd(tmp_path / "upstream")
    (tmp_path / "www").mkdir()
    pack(tmp_path / "upstream", tmp_path / "www/fsdd.tar.gz")
    whole = (tmp_path / "www/fsdd.tar.gz").read_bytes()
    (tmp_path / "www/cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    folder = copy_recipe("fsdd", tmp_path / "recipe")

    def run(name, digest=digest):
        return data_sh(
            folder, SMALL["fsdd"], FSDD="downloads", FSDD_URL=f"{url}/{name}", FSDD_SHA256=digest
        )

    with serving(tmp_path / "www") as url:
        for name, expected, message in (
            ("none.tar.gz", digest, "404"),
            ("cut.tar.gz", digest, "damaged"),
            ("fsdd.tar.gz", "0" * 64, "holds other recordings"),
        ):
            status, _, err = run(name, expected)
            assert status == 1 and message in err and "Trace" not in err
            assert not (folder / "downloads/fsdd").exists()
            (folder / "downloads/fsdd.tar.gz").unlink(missing_ok=True)
        status, _, err = run("fsdd.tar.gz")
        assert status == 0, err
    assert len(read(folder, "train_labelled")) == 12
    # The network is needed once.
    assert run("none.tar.gz")[:2] == (0, "fsdd: data/ is up to date\n")
    shutil.rmtree(folder / "data")
    assert run("none.tar.gz")[0] == 0


@needs_speech
def test_fsdd_sets_share_no_recording_and_text_is_what_is_said(make):
    folder = make("fsdd")
    words = load("fsdd").WORDS
    used = {}
    names = ["train_labelled", "train_unlabelled", "dev", "test", "test_labelled_domain"]
    for name in names:
        table = kaldi.read_scp(folder / f"data/{name}/utt2recordings")
        used[name] = {r for recordings in table.values() for r in recordings.split()}
        for utterance in read(folder, name):
            recordings = table[utterance.id].split()
            assert 3 <= len(recordings) <= 7
            assert {r.split("_")[1] for r in recordings} == {utterance.speaker}
            if utterance.text:
                assert utterance.text == " ".join(words[int(r[0])] for r in recordings)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            assert not used[one] & used[other]
    assert all(int(r.split("_")[2]) < 5 for n in names[3:] for r in used[n])


@needs_speech
def test_fsdd_digest_and_layouts_agree(tmp_path):
    corpus = load("fsdd")
    digits = corpus.read_digits(Path(SHARED) / "data/fsdd")
    assert len(digits) == 3000
    assert download.pcm_digest(digits) == corpus.DIGEST
    (tmp_path / "recordings").mkdir()
    some = {name: digits[name] for name in list(digits)[::300]}
    for name, samples in some.items():
        soundfile.write(tmp_path / f"recordings/{name}.wav", samples, 8000)
    again = corpus.read_digits(tmp_path)
    assert again.keys() == some.keys()
    for name in some:
        np.testing.assert_array_equal(again[name], some[name])


def test_joined_digits_have_pauses_of_noise_and_no_clicks():
    rng = np.random.default_rng(0)
    hum = (1000 * np.sin(np.arange(3000) * 0.2) + 10 * rng.standard_normal(3000)).astype(np.int16)
    hum[:200] = hum[:200] // 100  # a quiet frame, as a recording's own noise floor
    speech = load("fsdd").join([hum, hum, hum], rng)
    pauses = len(speech) - 3 * len(hum)
    assert 4 * 0.05 * 8000 <= pauses <= 4 * 0.3 * 8000
    frames = speech[: len(speech) // 40 * 40].reshape(-1, 40)
    assert np.sqrt(np.mean(frames**2, axis=1)).min() > 1e-5  # never digital silence
    # A hard cut would jump by as much as the sound is loud.
    assert np.abs(np.diff(speech)).max() < 1.2 * np.abs(np.diff(hum / 32768)).max()
