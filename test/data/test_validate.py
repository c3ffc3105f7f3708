"""data/validate: every fault planted once is found, by name; clean sets pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from espnet_pl.data import kaldi, validate
from espnet_pl.data.kaldi import Utterance

RATE = 8000
ROLES = {"labelled": "l", "unlabelled": "u", "valid": "d", "test": "t"}


def sound(seed, seconds=0.5):
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)).clip(-5, 5)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Four clean sets of four utterances each, of speakers of their own."""
    monkeypatch.chdir(tmp_path)
    for index, (role, name) in enumerate(ROLES.items()):
        utterances = []
        for number in range(4):
            speaker = f"{name}s{number % 2}"
            key = f"{speaker}-{number}"
            path = f"audio/{key}.flac"
            kaldi.write_audio(path, sound(10 * index + number), RATE)
            text = None if role == "unlabelled" else "YES NO"
            utterances.append(Utterance(key, speaker, path, text))
        kaldi.write_dir(f"data/{name}", utterances)
    return {role: f"data/{name}" for role, name in ROLES.items()}


def faults(sets, **options):
    return [p for p in validate.check(sets, **options) if not p.is_warning]


def only(sets, **options):
    """The one thing that is wrong."""
    (problem,) = validate.check(sets, **options)
    return problem


def edit(path, old, new):
    content = Path(path).read_bytes()
    assert content.count(old) == 1
    Path(path).write_bytes(content.replace(old, new))


def replace_audio(samples, rate=RATE, path="audio/ls0-0.flac", **options):
    options = {"subtype": "PCM_16", **options}
    soundfile.write(path, samples, rate, **options)


def as_wav(samples, **options):
    """Makes the first labelled recording a WAV file; returns its path."""
    replace_audio(samples, path="audio/ls0-0.wav", **options)
    edit("data/l/wav.scp", b"audio/ls0-0.flac", b"audio/ls0-0.wav")
    return Path("audio/ls0-0.wav")


def test_clean_sets_pass(sets):
    assert validate.check(sets) == []
    assert validate.check(sets, rate=RATE, nj=2) == []


AUDIO = {
    "missing audio": lambda p: p.unlink(),
    "zero-length audio": lambda p: p.write_bytes(b""),
    "unreadable audio": lambda p: p.write_bytes(b"junk" * 1000),
    "too short": lambda p: replace_audio(sound(0, 0.05)),
    "not mono": lambda p: replace_audio(np.stack([sound(0), sound(1)], axis=1)),
    "wrong rate": lambda p: replace_audio(sound(0), 16000),
}


@pytest.mark.parametrize("kind", AUDIO)
def test_audio_fault(sets, kind):
    AUDIO[kind](Path("audio/ls0-0.flac"))
    problem = only(sets, rate=RATE)
    assert problem[:3] == (kind, "data/l", "ls0-0")
    assert "audio/ls0-0.flac" in problem.detail
    assert not problem.is_warning


def test_no_samples(sets):
    as_wav(np.zeros(0))
    assert only(sets).kind == "zero-length audio"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_flac(sets, share):
    path = Path("audio/ls0-0.flac")
    replace_audio(sound(0, 4.0))
    assert not validate.check(sets)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    problem = only(sets)
    assert problem.name == "ls0-0"
    assert problem.kind in ("truncated audio", "unreadable audio")


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_truncated_wav(sets, share):
    path = as_wav(sound(0))
    assert not validate.check(sets)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert only(sets)[:3] == ("truncated audio", "data/l", "ls0-0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(sets, value):
    samples = sound(0)
    samples[1000] = value
    as_wav(samples, subtype="FLOAT")
    assert only(sets).kind == "NaN or infinite samples"


def test_mixed_rates_name_the_minority(sets):
    replace_audio(sound(0), 16000)
    assert only(sets)[:3] == ("mixed rate", "data/l", "ls0-0")


@pytest.mark.parametrize(
    ("samples", "kind"),
    [
        (np.zeros(4000), "silent audio"),
        (np.full(4000, 0.25), "silent audio"),
        (np.sign(np.sin(np.arange(4000.0))), "clipped audio"),
    ],
    ids=["zeros", "constant", "clipped"],
)
def test_doubtful_audio_is_a_warning(sets, samples, kind):
    replace_audio(samples)
    problem = only(sets)
    assert problem[:3] == (kind, "data/l", "ls0-0")
    assert problem.is_warning


def test_two_silent_files_are_not_an_overlap(sets):
    replace_audio(np.zeros(4000))
    replace_audio(np.zeros(4000), path="audio/ts0-0.flac")
    assert not faults(sets)


LISTS = {
    "duplicate id": ("l/text", b"ls0-2 YES NO\n", b"ls0-0 NO\nls0-2 YES NO\n", "ls0-0"),
    "empty text": ("l/text", b"ls0-2 YES NO\n", b"ls0-2 \n", "ls0-2"),
    "NUL byte": ("l/text", b"ls0-2 YES", b"ls0-2 Y\0ES", "text:2"),
    "CRLF line end": ("l/text", b"ls0-2 YES NO\n", b"ls0-2 YES NO\r\n", "text:2"),
    "not UTF-8": ("l/text", b"ls0-2 YES", b"ls0-2 CAF\xe9", "text:2"),
    "unusual white space": ("l/text", b"ls0-2 YES NO", b"ls0-2 YES\xe3\x80\x80NO", "text:2"),
    "blank line": ("l/text", b"ls0-2", b"\nls0-2", "text:2"),
    "unsorted": ("l/text", b"ls0-0 YES NO\nls0-2 YES NO", b"ls0-2 YES\nls0-0 NO", "ls0-0"),
    "no value": ("l/wav.scp", b"ls1-3 audio/ls1-3.flac", b"ls1-3", "ls1-3"),
    "audio without text": ("l/text", b"ls0-2 YES NO\n", b"", "ls0-2"),
    "text without audio": ("l/text", b"ls0-2 YES", b"ls0-1 NO\nls0-2 YES", "ls0-1"),
    "spk2utt and utt2spk differ": ("l/spk2utt", b"ls0-0 ", b"", "ls0"),
}


@pytest.mark.parametrize("kind", LISTS)
def test_list_fault(sets, kind):
    name, old, new, culprit = LISTS[kind]
    edit(f"data/{name}", old, new)
    found = [p for p in faults(sets) if p.kind == kind]
    assert [(p.where, p.name) for p in found] == [("data/l", culprit)]
    # A line without its path is also a file that is not there; nothing else has consequences.
    assert len(faults(sets)) == (2 if kind == "no value" else 1)


def test_missing_and_empty_lists(sets):
    os.unlink("data/l/text")
    Path("data/d/text").write_text("")
    found = {(p.kind, p.where, p.name) for p in faults(sets)}
    assert ("unreadable list", "data/l", "text") in found
    assert ("empty list", "data/d", "text") in found


def test_a_missing_directory_is_a_problem_and_no_crash(sets):
    assert {p.where for p in faults({**sets, "test": "data/nowhere"})} == {"data/nowhere"}


@pytest.mark.parametrize("command", ["touch pwned; cat audio/ls0-0.flac |", "| touch pwned"])
def test_commands_are_refused_and_not_run(sets, command):
    edit("data/l/wav.scp", b"ls0-0 audio/ls0-0.flac", f"ls0-0 {command}".encode())
    problem = only(sets, write_shapes=True)
    assert problem[:3] == ("command instead of a file", "data/l", "ls0-0")
    assert not os.path.exists("pwned")


@pytest.mark.parametrize("key", ["../ls0-0", "-ls0-0", ".ls0-0"])
def test_unsafe_id(sets, key):
    for name in ("wav.scp", "text", "utt2spk", "spk2utt"):
        content = Path(f"data/l/{name}").read_text()
        Path(f"data/l/{name}").write_text(content.replace("ls0-0 ", f"{key} "))
    assert [(p.kind, p.name) for p in faults(sets)] == [("unsafe id", key)]


@pytest.mark.parametrize("train", ["labelled", "unlabelled"])
@pytest.mark.parametrize("held_out", ["valid", "test"])
def test_overlap_by_audio_whatever_its_name_and_format(sets, train, held_out):
    one, other = ROLES[train], ROLES[held_out]
    samples, _ = soundfile.read(f"audio/{other}s1-1.flac", dtype="int16")
    soundfile.write(f"audio/{one}s0-0.wav", samples, RATE)
    edit(f"data/{one}/wav.scp", f"audio/{one}s0-0.flac".encode(), f"audio/{one}s0-0.wav".encode())
    problem = only(sets)
    assert problem[:3] == ("same audio in both", f"data/{one} and data/{other}", f"{other}s1-1")
    assert f"{one}s0-0" in problem.detail
    assert not problem.is_warning


def test_overlap_by_id(sets):
    for name in ("wav.scp", "text", "utt2spk", "spk2utt"):
        content = Path(f"data/t/{name}").read_text()
        Path(f"data/t/{name}").write_text(content.replace("ts0-0 ", "ls0-0 "))
    assert [p[:3] for p in faults(sets)] == [("same id in both", "data/l and data/t", "ls0-0")]


def test_valid_and_test_may_overlap_with_a_warning(sets):
    problems = validate.check({**sets, "test": sets["valid"]})
    assert {p.kind for p in problems} == {"same id in both", "same audio in both"}
    assert all(p.is_warning for p in problems)


def test_a_speaker_in_labelled_and_test_is_a_warning(sets):
    for name in ("utt2spk", "spk2utt"):
        content = Path(f"data/t/{name}").read_text().replace(" ts0\n", " ls0\n")
        Path(f"data/t/{name}").write_text(content.replace("ts0 ", "ls0 "))
    problem = only(sets)
    assert problem[:3] == ("same speaker in both", "data/l and data/t", "ls0")
    assert problem.is_warning


def test_shapes_are_written_for_sound_sets_only_and_left_alone_when_right(sets):
    replace_audio(sound(0, 0.05))
    validate.check(sets, write_shapes=True)
    assert not os.path.exists("data/l/speech_shape")
    for name in ("utt2num_samples", "speech_shape"):
        assert kaldi.read_scp(f"data/t/{name}") == dict.fromkeys(
            ("ts0-0", "ts0-2", "ts1-1", "ts1-3"), "4000"
        )
    before = os.stat("data/t/speech_shape").st_mtime_ns
    validate.check(sets, write_shapes=True)
    assert os.stat("data/t/speech_shape").st_mtime_ns == before


def test_a_second_look_decodes_only_what_changed(sets, monkeypatch):
    validate.check(sets)
    looked_at = []
    inspect = validate.inspect
    monkeypatch.setattr(validate, "inspect", lambda p: looked_at.append(p) or inspect(p))
    assert validate.check(sets) == []
    assert looked_at == []
    replace_audio(sound(0, 0.05))
    assert only(sets).kind == "too short"
    assert looked_at == ["audio/ls0-0.flac"]
    Path("data/u/.audio_checks.json").write_text(json.dumps({"audio/us0-0.flac": [1, "x"]}))
    assert only(sets).kind == "too short"
    assert len(looked_at) == 5  # a damaged cache is no cache


def test_unknown_role(sets):
    with pytest.raises(ValueError, match="unknown roles .'dev'"):
        validate.check({"dev": "data/d"})


def test_the_command_lists_everything_at_once_and_fails(sets):
    def run(*options):
        roles = [word for role, path in sets.items() for word in (f"--{role}", path)]
        command = [sys.executable, "-m", "espnet_pl.data.validate", *roles, *options]
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    assert run("--nj", "2", "--rate", "8000") == (0, ["0 problems, 0 warnings"])
    for number, name in enumerate(("us0-0", "us0-2", "us1-1", "us1-3")):
        Path(f"audio/{name}.flac").write_bytes(b"" if number else b"junk")
    replace_audio(np.zeros(4000))
    status, lines = run()
    assert status == 1
    assert lines[0].startswith("problem: data/u: 1 x unreadable audio: us0-0 (audio/us0-0.flac")
    assert lines[1].startswith("problem: data/u: 3 x zero-length audio: us0-2 (audio/us0-2.flac)")
    assert lines[2].startswith("warning: data/l: 1 x silent audio: ls0-0")
    assert lines[3] == "4 problems, 1 warnings"


def test_the_report_stops_after_a_few_names():
    problems = [validate.Problem("too short", "data/l", f"u{n}") for n in range(9)]
    assert validate.describe(problems) == (
        "problem: data/l: 9 x too short: u0, u1, u2, u3, u4, ..."
    )
