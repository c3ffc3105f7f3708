"""egs/*/pl1/local/data.sh, each at a small size in a copy of its recipe."""

import io
import os
import tarfile

import pytest
import soundfile

from espnet_pl.data import download, validate
from test.egs.corpora import (
    SMALL,
    copy_recipe,
    data_sh,
    made_by_data_sh,
    needs_speech,
    read,
    speakers,
)

HELD_OUT = {"mini_alnum": ["test"], "fsdd": ["test"], "an4": ["test", "test_ext"]}


@pytest.fixture(
    params=["mini_alnum", *(pytest.param(c, marks=needs_speech) for c in ("fsdd", "an4"))]
)
def made(request, make):
    """(corpus, its recipe with all data made)."""
    return request.param, make(request.param)


def test_sets_are_valid_and_do_not_overlap(made, monkeypatch):
    corpus, folder = made
    monkeypatch.chdir(folder)
    problems = validate.check(
        {
            "labelled": "data/train_labelled",
            "unlabelled": "data/train_unlabelled",
            "valid": "data/dev",
            "test": [f"data/{name}" for name in HELD_OUT[corpus]],
        },
        rate=16000 if corpus == "an4" else 8000,
    )
    if corpus == "mini_alnum":  # one cast of voices speaks in both of its domains
        assert {p.kind for p in problems} == {"same speaker in both"}
        problems = [p for p in problems if not p.is_warning]
    assert problems == []


def test_a_second_run_does_nothing(made):
    corpus, folder = made
    before = made_by_data_sh(folder, times=True)
    status, out, _ = data_sh(folder, SMALL[corpus])
    assert (status, out) == (0, f"{corpus}: data/ is up to date\n")
    assert made_by_data_sh(folder, times=True) == before


def test_made_again_it_is_the_same_to_the_byte(made, tmp_path):
    corpus, folder = made
    again = copy_recipe(corpus, tmp_path / "again")
    status, _, err = data_sh(again, SMALL[corpus])
    assert status == 0, err
    assert made_by_data_sh(again) == made_by_data_sh(folder)


def test_lost_audio_is_made_again(made):
    corpus, folder = made
    before = made_by_data_sh(folder)
    next((folder / "dump").rglob("*.flac")).unlink()
    status, _, err = data_sh(folder, SMALL[corpus])
    assert status == 0, err
    assert made_by_data_sh(folder) == before


def test_unlabelled_has_no_text_and_the_oracle_has_it(made):
    corpus, folder = made
    assert not (folder / "data/train_unlabelled/text").exists()
    real = "_real" if corpus == "an4" else ""
    labelled = read(folder, f"train_labelled{real}")
    unlabelled = read(folder, f"train_unlabelled{real}")
    assert not any(u.text for u in unlabelled)
    oracle = {u.id: u for u in read(folder, "train_oracle")}
    parts = labelled + unlabelled
    assert sorted(oracle) == sorted(u.id for u in parts)
    assert all(u.text for u in oracle.values())
    assert all(oracle[u.id].wav == u.wav for u in parts)
    assert all(oracle[u.id] == u for u in labelled)


def test_no_speaker_is_in_two_sets(made):
    corpus, folder = made
    names = ["train_labelled", "train_unlabelled", "dev", *HELD_OUT[corpus]]
    if corpus == "mini_alnum":  # there the voices are the same and the recordings are not
        assert speakers(folder, "dev") & speakers(folder, "train_labelled")
        wavs = [u.wav for name in names for u in read(folder, name)]
        assert len(wavs) == len(set(wavs))
        return
    if corpus == "fsdd":
        names = names[:2]  # the others are other recordings, see below
    everyone = [s for name in names for s in speakers(folder, name)]
    assert len(everyone) == len(set(everyone))


def test_audio_follows_dumpdir(tmp_path):
    pytest.importorskip("espeakng_loader")
    folder = copy_recipe("mini_alnum", tmp_path / "recipe")
    status, _, err = data_sh(folder, SMALL["mini_alnum"], dumpdir=str(tmp_path / "scratch"))
    assert status == 0, err
    assert not (folder / "dump").exists()
    assert all(u.wav.startswith(str(tmp_path / "scratch/audio")) for u in read(folder, "dev"))


def test_mini_alnum_texts_of_test_are_new(make):
    folder = make("mini_alnum")
    train = {u.text for u in read(folder, "train_oracle")}
    assert not {u.text for name in ("test", "dev") for u in read(folder, name)} & train


def test_mini_alnum_options(tmp_path):
    pytest.importorskip("espeakng_loader")
    folder = copy_recipe("mini_alnum", tmp_path)
    seen = []
    for options in ("", "--seed 1", "--shift 0", "--rate 16000"):
        # As the stage driver is told: it gives data.sh no options of its own.
        status, _, err = data_sh(folder, local_data_opts=f"{SMALL['mini_alnum']} {options}")
        assert status == 0, err
        seen.append(made_by_data_sh(folder))
        for name, minutes in (("train_labelled", 0.3), ("train_unlabelled", 0.4)):
            seconds = sum(soundfile.info(folder / u.wav).duration for u in read(folder, name))
            assert 0 <= seconds - 60 * minutes < 10
    assert soundfile.info(folder / read(folder, "dev")[0].wav).samplerate == 16000
    assert len({tuple(sorted(d.values())) for d in seen}) == 4
    assert data_sh(folder, "--shift -1")[0] != 0


@pytest.mark.parametrize("corpus", ["fsdd", "an4"])
def test_without_a_corpus_it_says_what_to_do(tmp_path, corpus):
    folder = copy_recipe(corpus, tmp_path / "recipe")
    status, _, err = data_sh(folder, ESPNET_PL_SHARED="")
    assert status == 1
    assert f"Set {corpus.upper()}=<folder>" in err and "downloads" in err and "Trace" not in err
    status, _, err = data_sh(folder, **{corpus.upper(): str(tmp_path)})
    assert status == 1
    assert "does not hold the corpus" in err and "Trace" not in err


def test_an_archive_cannot_write_elsewhere(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../out.wav", f"{tmp_path}/abs.wav", "in.wav"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert download.unpack(tmp_path / "a.tar", tmp_path / "to", lambda name: name) == 1
    assert os.listdir(tmp_path / "to") == ["in.wav"]
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "to"]
