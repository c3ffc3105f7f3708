"""bridge/label and what a training does with its records: end to end, resumed, refused by name."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from espnet_pl.bridge import label, teachers
from espnet_pl.bridge.export import export
from espnet_pl.bridge.teaching import RECORDS
from espnet_pl.bridge.train import ConfigError, load_config, main
from espnet_pl.methods import csl
from espnet_pl.parts.store import Reader, StoreError
from test.bridge import taught
from test.bridge.conftest import ASR, TRANSDUCER
from test.bridge.models import CONFS, WORDS, model_folder

ROOT = Path(__file__).parents[2]
LETTERS = ["<blank>", "<unk>", "<space>", "A", "B", "C", "<sos/eos>"]
NAME = "test.bridge.taught"


@pytest.fixture
def teacher(tmp_path):
    """Of another family than the student, and with other tokens; what it says can be learnt."""
    return model_folder(tmp_path / "teacher", "transducer", LETTERS, "char", seed=3)


@pytest.fixture
def ask(corpus, tmp_path):
    """Calls the command; returns the folder of the store."""

    def call(teacher, *words, out="store", data=None, method=NAME, **settings):
        data = data or corpus / "data/unlabelled"
        config = {"method": method, "method_conf": settings}
        (tmp_path / f"{out}.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "asr.yaml").write_text(yaml.safe_dump(ASR))
        argv = ["--config", str(tmp_path / "asr.yaml"), "--config", str(tmp_path / f"{out}.yaml")]
        argv += ["--teacher", str(teacher), "--output", str(tmp_path / out)]
        argv += ["--wav", str(data / "wav.scp"), "--shape", str(data / "speech_shape"), *words]
        label.main(argv)
        return tmp_path / out

    return call


@pytest.fixture
def train(arguments, teacher, tmp_path):
    """Trains with the toy method, from the teacher's folder, for one epoch."""

    def call(*words, out="exp", method=NAME, method_conf=None, given=(teacher,), **changes):
        changes = dict(max_epoch=1, num_iters_per_epoch=6) | changes
        argv = arguments(method, out, method_conf, **changes)
        main([*argv, *(w for t in given for w in ("--teachers", str(t))), *words])
        return torch.load(tmp_path / out / "1epoch.pth")

    return call


def copied(corpus, folder):
    """The unlabelled set, to be changed."""
    shutil.copytree(corpus / "data/unlabelled", folder)
    return folder


def test_a_training_learns_the_same_from_records_and_from_the_teacher(
    ask, train, teacher, tmp_path
):
    # Alone, without padding, both times: the windows of a spectrum see what follows the speech.
    alone = dict(batch_type="unsorted", batch_size=1)
    store = ask(teacher, "--batch_bins", "1")
    stored = train("--teacher_store", str(store), out="stored", **alone)
    given = taught.Method.seen.resources
    assert given["teacher"] is None and len(given["records"]) == 10
    online = train("--teacher_mode", "online", out="online", **alone)
    given = taught.Method.seen.resources
    assert given["records"] is None and not given["teacher"].training
    assert stored.keys() == online.keys()
    assert all(torch.equal(stored[name], online[name]) for name in stored)
    other = model_folder(tmp_path / "other", "transducer", LETTERS, "char", seed=4)
    otherwise = train("--teacher_mode", "online", out="otherwise", given=[other], **alone)
    assert any(not torch.equal(stored[name], otherwise[name]) for name in stored)
    # What is exported is stock again, and the checkpoint has nothing of the teacher.
    export(tmp_path / "stored", tmp_path / "stored/model")
    config = yaml.safe_load((tmp_path / "stored/model/config.yaml").read_text())
    assert not [key for key in config if key.startswith(("teacher", "method"))]
    states = torch.load(tmp_path / "online/checkpoint.pth", weights_only=False)
    assert [*states["optimizers"][0]["method"]] == ["step"]


def test_what_a_method_is_given(ask, train, teacher, tmp_path):
    train("--teacher_store", str(ask(teacher)))
    given = taught.Method.seen.resources
    assert set(given) == {
        "truth", "teacher", "records", "translate", "same_tokens", "same_frames", "teacher_tokens",
        "teacher_answers",
    }  # fmt: skip
    assert given["teacher_tokens"] == 7
    assert given["translate"]([3, 2, 5]) == [2, 4] and given["translate"]([3, 5]) is None
    assert given["same_tokens"] is False and given["same_frames"] is True
    answers = {"supervised", "features", "score", "propose", "frame_log_probs"}
    assert given["teacher_answers"] == frozenset({*answers, "lattices"})
    twice = CONFS["ctc"]["encoder_conf"] | {"input_layer": "conv2d2"}
    other = model_folder(tmp_path / "other", "ctc", WORDS, encoder_conf=twice)
    for words in (("--teacher_mode", "online"), ("--teacher_store", str(ask(other, out="s2")))):
        train(*words, given=[other])
        given = taught.Method.seen.resources
        assert given["same_tokens"] is True and given["same_frames"] is False
        assert given["translate"]([1, 1]) == [1, 1]
        assert given["teacher_answers"] == frozenset(answers)


def test_a_transducer_is_taught_by_a_packed_model(ask, arguments, teacher, tmp_path, monkeypatch):
    from test.bridge.test_teachers import packed

    monkeypatch.chdir(tmp_path)
    zipped = packed(teacher, tmp_path / "teacher.zip")
    store = ask(zipped)
    argv = arguments(NAME, base=TRANSDUCER, max_epoch=1)
    main([*argv, "--teachers", str(zipped), "--teacher_store", str(store)])
    main([*argv, "--teachers", str(teacher), "--teacher_store", str(store)])  # it is the same


def test_what_the_records_are(ask, corpus, teacher):
    store = ask(teacher, "--batch_bins", "1")
    reader = Reader(store)
    assert sorted(reader.meta) == [
        "answers", "asked", "format", "frames", "teacher", "tokens", "utterances", "wav_ids"
    ]  # fmt: skip
    assert reader.meta["asked"] == {
        "records": RECORDS, "method": NAME, "settings": {"beam": 2},
        "speech_volume_normalize": None,
    }  # fmt: skip
    assert reader.meta["teacher"] == teachers.hash_of(teacher) and reader.meta["utterances"] == 10
    done = json.loads((store / "done.json").read_text())
    assert done == {key: value for key, value in reader.meta.items() if key != "tokens"}
    loaded = teachers.load(teacher).network
    for line in (corpus / "data/unlabelled/wav.scp").read_text().splitlines():
        utt_id, wav = line.split()
        speech = torch.tensor(soundfile.read(wav, dtype="float32")[0])[None]
        x = taught.base.Utterances([utt_id], speech, torch.tensor([speech.shape[1]]))
        with torch.no_grad():
            (expected,) = taught.Method.ask(taught.Config(), loaded, x)
        found = reader.get(utt_id)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_shards_and_a_second_call(ask, teacher, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    store = ask(teacher, "--shard", "1/3")
    ask(teacher, "--shard", "3/3")
    assert not (store / "done.json").exists() and "2of3.sqlite not there" in caplog.text
    ask(teacher, "--shard", "2/3")
    assert len(Reader(store)) == 10 and (store / "done.json").exists()
    whole = ask(teacher, out="whole")
    for utt_id in (f"unlabelled{i:02d}" for i in range(10)):
        one, other = (Reader(folder).get(utt_id)["labels"] for folder in (store, whole))
        assert torch.equal(one, other)
    monkeypatch.setattr(taught.Method, "ask", lambda *_: pytest.fail("asked again"))
    ask(teacher, out="whole")
    assert "10 of 10 utterances are there already" in caplog.text
    assert "10/10 utterances" in caplog.text and "times real time" in caplog.text


def test_what_is_known_of_all_speech_is_found_once(ask, train, teacher, monkeypatch):
    settings = {"units": "clusters", "clusters": 4}
    store = ask(teacher, "--shard", "1/2", method="csl", **settings)
    known = torch.load(store / "known.pt", weights_only=True)["found"]
    assert list(known) == ["centres"] and len(known["centres"]) == 4
    monkeypatch.setattr(csl.Method, "survey", lambda *_: pytest.fail("learnt again"))
    ask(teacher, "--shard", "2/2", method="csl", **settings)
    records = Reader(store)
    seen = {y for i in range(10) for y in records.get(f"unlabelled{i:02d}")["labels"].tolist()}
    assert seen == {0, 1, 2, 3} and len(records.meta["known"]) == 64
    train("--teacher_store", str(store), method="csl", method_conf=settings)


def test_what_is_known_with_other_settings_is_refused(ask, teacher):
    settings = {"units": "clusters", "clusters": 4}
    store = ask(teacher, "--shard", "1/2", method="csl", **settings)
    for path in store.iterdir():  # stopped before its first record was kept
        if path.name != "known.pt":
            path.unlink()
    wanted = (
        "known.pt: made of something else: asked.*clusters is 4 there, 3 is wanted. Give another"
    )
    with pytest.raises(StoreError, match=wanted):
        ask(teacher, "--shard", "1/2", method="csl", **settings | {"clusters": 3})


def test_of_two_shards_that_learn_at_once_one_counts(tmp_path):
    path = tmp_path / "known.pt"

    def late():
        assert label._known(path, {}, lambda: {"a": torch.ones(2)})["a"].tolist() == [1, 1]
        return {"a": torch.zeros(2)}

    assert label._known(path, {}, late)["a"].tolist() == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["known.pt"]
    assert label._known(tmp_path / "none.pt", {}, dict) == {}
    assert not (tmp_path / "none.pt").exists()


def test_other_settings_teachers_and_speech_are_refused(ask, train, teacher, corpus, tmp_path):
    store = ask(teacher)
    other = model_folder(tmp_path / "other", "transducer", LETTERS, "char", seed=1)
    use = ("--teacher_store", str(store))
    with pytest.raises(StoreError, match=r"asked.settings.beam is 2 there, 3 is wanted"):
        ask(teacher, beam=3)
    with pytest.raises(StoreError, match="teacher is "):
        ask(other)
    with pytest.raises(ConfigError, match=r"(?s)asked.settings.beam is 2 .*3 is .*bridge.label"):
        train(*use, method_conf={"beam": 3})
    with pytest.raises(ConfigError, match=r"teacher_store: .*teacher is "):
        train(*use, given=[other])
    with pytest.raises(ConfigError, match="asked.speech_volume_normalize is None there, 0.5"):
        train(*use, speech_volume_normalize=0.5)
    train(*use, method_conf={"weight": 0.5})  # what is not asked may be otherwise

    fewer = copied(corpus, tmp_path / "fewer")
    for name in ("wav.scp", "speech_shape"):
        lines = (fewer / name).read_text().splitlines()[:4]
        (fewer / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(StoreError, match="utterances is 10 there, 4 is wanted"):
        ask(teacher, data=fewer)
    small = ask(teacher, data=fewer, out="small")
    with pytest.raises(ConfigError, match="no record of 6 unlabelled utterances: unlabelled04, un"):
        train("--teacher_store", str(small))


def test_a_taught_method_without_its_teacher(ask, train, teacher, arguments, tmp_path):
    store = tmp_path / "none"
    for given in ([], [teacher, teacher]):
        with pytest.raises(ConfigError, match=f"one teacher, {len(given)} are given"):
            train(given=given)
    with pytest.raises(ConfigError, match=r"(?s)--teacher_store. .*bridge.label --config.*online"):
        train()
    with pytest.raises(ConfigError, match="none: no records here"):
        train("--teacher_store", str(store))
    with pytest.raises(ConfigError, match="did you mean 'online'"):
        train(teacher_mode="onlin")
    with pytest.raises(ConfigError, match="learns from no teacher"):
        label.label({"method": "mpl"}, teacher, store, store, store)
    with pytest.raises(ConfigError, match="of type phn cannot be written"):
        path = teacher / "config.yaml"
        path.write_text(path.read_text().replace("token_type: char", "token_type: phn"))
        train("--teacher_mode", "online")
    # Features are counted before there is a teacher.
    main([*arguments(NAME, "stats", normalize=None), "--collect_stats", "true"])


@pytest.mark.parametrize("bad", ["gone", "nan", "unlisted"])
def test_a_recording_that_cannot_be_used_is_named(bad, ask, teacher, corpus, tmp_path):
    data = copied(corpus, tmp_path / "data")
    wavs = dict(line.split() for line in (data / "wav.scp").read_text().splitlines())
    wavs["unlabelled03"] = str(tmp_path / "bad.wav")
    if bad == "nan":
        soundfile.write(tmp_path / "bad.wav", np.full(5000, np.nan), 8000, subtype="FLOAT")
    if bad == "unlisted":
        del wavs["unlabelled03"]
    (data / "wav.scp").write_text("".join(f"{k} {v}\n" for k, v in wavs.items()))
    with pytest.raises(ConfigError, match="utterance unlabelled03 (cannot be read|has samples)"):
        ask(teacher, "--batch_bins", "1", data=data)
    with pytest.raises(StoreError, match="not finished"):  # what was before it is kept
        Reader(tmp_path / "store")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--shard", "5/4"], "is no shard"), (["--ngpu", "2"], "invalid choice")],
)
def test_wrong_flags(words, message, ask, teacher, capsys):
    with pytest.raises(SystemExit):
        ask(teacher, *words)
    assert message in capsys.readouterr().err


def test_lists_that_are_none(ask, teacher, corpus, tmp_path):
    data = copied(corpus, tmp_path / "data")
    for content, message in (("a\n", "speech_shape:1: expected"), ("\n", "no utterances")):
        (data / "speech_shape").write_text(content)
        with pytest.raises(ConfigError, match=message):
            ask(teacher, data=data)
    (data / "wav.scp").unlink()
    with pytest.raises(ConfigError, match="wav.scp is missing"):
        ask(teacher, data=data)


SLOW = """
import signal, time
from espnet_pl.bridge import label
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a test in the background ignores
from test.bridge.taught import Method
said, label.COMMIT_EVERY = Method.ask, 0.0
def ask(*x):
    time.sleep(0.3)
    return said(*x)
Method.ask = ask
label.main({argv})
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_goes_on_where_it_was_stopped(sign, ask, teacher, tmp_path, monkeypatch):
    given = []
    with monkeypatch.context() as patch:
        patch.setattr(label, "main", given.extend)
        store = ask(teacher, "--batch_bins", "1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(argv=given)], env=env, stderr=subprocess.DEVNULL
    )
    path, end = store / "records.1of1.sqlite", time.monotonic() + 120
    journal = path.with_name(f"{path.name}-journal")  # begins with zeros when all is committed
    while not path.exists() or path.stat().st_size < 20000 or journal.read_bytes()[:8].strip(b"\0"):
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.05)
    child.send_signal(sign)
    assert child.wait() != 0
    with pytest.raises(StoreError, match="not finished"):
        Reader(store)
    asked = []
    said = taught.Method.ask
    monkeypatch.setattr(taught.Method, "ask", lambda *x: asked.append(0) or said(*x))
    ask(teacher, "--batch_bins", "1")
    assert len(Reader(store)) == 10 and 0 < len(asked) < 10


def test_the_command_of_the_refusal_is_the_one_that_helps(ask, train, teacher, tmp_path, capsys):
    with pytest.raises(ConfigError) as refused:
        train("--teacher_store", str(tmp_path / "made"))
    argv = next(line for line in str(refused.value).splitlines() if "bridge.label" in line).split()
    label.main(argv[3:])
    train("--teacher_store", str(tmp_path / "made"))
    assert load_config([tmp_path / "exp/train.yaml"])["method"] == NAME
