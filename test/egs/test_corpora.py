"""egs/*/pl1/local/data.sh, each at a small size in a copy of its recipe."""

import contextlib
import csv
import functools
import hashlib
import http.server
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from espnet_pl.data import download, kaldi, validate

ROOT = Path(__file__).parents[2]
SHARED = os.environ.get("ESPNET_PL_SHARED")
needs_speech = pytest.mark.skipif(
    not SHARED, reason="ESPNET_PL_SHARED is not set (a folder with data/an4 and data/fsdd)"
)
# The sizes that still fill every set.
SMALL = {
    "mini_alnum": "--labelled_minutes 0.3 --unlabelled_minutes 0.4 --dev_minutes 0.2 "
    "--test_minutes 0.3",
    "fsdd": "--labelled_strings 12 --unlabelled_strings 12 --dev_strings 9 --test_strings 9",
    "an4": "--generated_minutes 0.3 --generated_speakers 6",
}
HELD_OUT = {"mini_alnum": ["test"], "fsdd": ["test"], "an4": ["test", "test_ext"]}


def copy_recipe(corpus, folder):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / f"egs/{corpus}/pl1/local", folder / "local")
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(ROOT / f"egs/{corpus}/pl1/db.sh", folder)
    return folder


def data_sh(folder, options="", **environment):
    """Runs local/data.sh as the stage driver does; returns (status, stdout, stderr)."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ours = ("dumpdir", "local_data_opts", "AN4", "FSDD")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        ["local/data.sh", *options.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**kept, "PATH": path, "PYTHONPATH": python_path, **environment},
    )
    return done.returncode, done.stdout, done.stderr


def made_by_data_sh(folder, times=False):
    """Every file below data/ and dump/: its digest and, if asked, when it was written."""
    files = [p for top in ("data", "dump") for p in (folder / top).rglob("*") if p.is_file()]
    return {
        str(p.relative_to(folder)): (
            hashlib.sha256(p.read_bytes()).hexdigest(),
            p.stat().st_mtime_ns if times else 0,
        )
        for p in files
        if p.name != validate.CACHE
    }


def load(corpus):
    path = ROOT / f"egs/{corpus}/pl1/local/prepare_corpus.py"
    spec = importlib.util.spec_from_file_location(f"{corpus}_corpus", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        patch.setattr(sys, "dont_write_bytecode", True)  # local/ is the recipe's input
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Gives a corpus's recipe with all its data made, each made once."""

    @functools.cache
    def make(corpus):
        if corpus != "fsdd":
            pytest.importorskip("espeakng_loader")
        folder = copy_recipe(corpus, tmp_path_factory.mktemp(corpus))
        status, out, err = data_sh(folder, SMALL[corpus])
        assert status == 0, err
        assert len(out.splitlines()) == len([p for p in (folder / "data").iterdir() if p.is_dir()])
        return folder

    return make


@pytest.fixture(
    params=["mini_alnum", *(pytest.param(c, marks=needs_speech) for c in ("fsdd", "an4"))]
)
def made(request, make):
    """(corpus, its recipe with all data made)."""
    return request.param, make(request.param)


def read(folder, name):
    return kaldi.read_dir(folder / "data" / name)


def speakers(folder, name):
    return {u.speaker for u in read(folder, name)}


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


# --- mini_alnum ---------------------------------------------------------------------------------


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


# --- real speech: where it comes from ------------------------------------------------------------


@pytest.mark.parametrize("corpus", ["fsdd", "an4"])
def test_without_a_corpus_it_says_what_to_do(tmp_path, corpus):
    folder = copy_recipe(corpus, tmp_path / "recipe")
    status, _, err = data_sh(folder, ESPNET_PL_SHARED="")
    assert status == 1
    assert f"Set {corpus.upper()}=<folder>" in err and "downloads" in err and "Trace" not in err
    status, _, err = data_sh(folder, **{corpus.upper(): str(tmp_path)})
    assert status == 1
    assert "does not hold the corpus" in err and "Trace" not in err


@contextlib.contextmanager
def serving(folder):
    """The folder by HTTP on this machine; gives its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="repository-0123abc")


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


# --- fsdd ---------------------------------------------------------------------------------------


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


# --- an4 ----------------------------------------------------------------------------------------


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
    from espnet_pl.data.synthesis import CLOSED_CLASSES

    known = {word for u in read(folder, "train_labelled") for word in u.text.split()}
    generated = {w for u in read(folder, "train_labelled_generated") for w in u.text.split()}
    assert generated <= known | CLOSED_CLASSES
