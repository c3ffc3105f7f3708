"""bridge/checkpoints, owner, fits: files that are whole or known not to be, and whose they are."""

import argparse
import datetime
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from espnet_pl.bridge import checkpoints, fits
from espnet_pl.bridge.owner import Owner, TakenOverError
from espnet_pl.methods.base import ConfigError


def states(number=0.0):
    return {
        "model": torch.nn.BatchNorm1d(3).state_dict(),
        "number": torch.tensor(number),
        "reporter": {"stats": {1: {"train": {"loss": np.float64(2.5), "time": time(3)}}}},
        "pair": (1, [None, "a"]),
    }


def time(seconds):
    return datetime.timedelta(seconds=seconds)


def test_a_checkpoint_comes_back_and_is_read_without_code(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoints.write(states(), path)
    found = checkpoints.read(path)
    assert found["reporter"] == {"stats": {1: {"train": {"loss": 2.5, "time": time(3)}}}}
    assert found["pair"] == (1, [None, "a"])
    assert found["model"]._metadata == states()["model"]._metadata
    assert torch.equal(torch.load(path, weights_only=True)["number"], torch.tensor(0.0))


def test_the_one_before_is_kept(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for number in (1.0, 2.0, 3.0):
        checkpoints.write(states(number), path)
    assert checkpoints.read(path)["number"] == 3
    assert checkpoints.read(checkpoints.previous(path))["number"] == 2
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pth", "checkpoint.pth"]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_what_is_damaged_is_known_and_the_one_before_is_taken(harm, tmp_path, caplog):
    path, draw = tmp_path / "checkpoint.pth", random.Random(harm)
    for _ in range(1 if harm == "empty" else 20):
        for number in (1.0, 2.0):
            checkpoints.write(states(number), path)
        content = bytearray(path.read_bytes())
        if harm == "flip":
            bit = draw.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content[: draw.randrange(len(content))] if harm == "cut" else content)
        if harm == "empty":
            path.write_bytes(b"")
        with pytest.raises(checkpoints.DamagedError, match=str(path)):
            checkpoints.read(path)
        caplog.clear()
        assert checkpoints.newest(tmp_path) == path
        assert checkpoints.read(path)["number"] == 1
        assert "goes on from" in caplog.text and "the one before" in caplog.text
        assert (tmp_path / "checkpoint.damaged.pth").exists()


def test_none_is_whole(tmp_path):
    path = tmp_path / "checkpoint.pth"
    assert checkpoints.newest(tmp_path) is None
    for file in (path, checkpoints.previous(path)):
        file.write_bytes(b"no zip archive")
    with pytest.raises(ConfigError, match="no checkpoint is whole: .*checkpoint.pth .14 bytes"):
        checkpoints.newest(tmp_path)
    assert path.read_bytes() == b"no zip archive"  # nothing is lost


def test_a_kill_between_two_renames_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pth"
    checkpoints.write(states(1.0), path)
    path.rename(checkpoints.previous(path))
    assert checkpoints.newest(tmp_path) == path and checkpoints.read(path)["number"] == 1


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    checkpoints.write(states(1.0), path)

    def full(states, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_save", full)
    with pytest.raises(OSError, match="cannot write .*No space left.*is kept. Make room"):
        checkpoints.write(states(2.0), path)
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
    assert checkpoints.read(path)["number"] == 1


def test_what_espnet_saves_is_replaced_at_once(tmp_path):
    told = []
    with checkpoints.saving(tmp_path, told.append):
        torch.save({"a": 1}, tmp_path / "1epoch.pth")
        torch.save({"b": 2}, tmp_path / "checkpoint.pth")
        with pytest.raises(OSError, match="cannot write"):
            torch.save(lambda: 0, tmp_path / "1epoch.pth")  # cannot be pickled
    assert told == [{"b": 2}] and os.listdir(tmp_path) == ["1epoch.pth"]
    assert torch.load(tmp_path / "1epoch.pth") == {"a": 1}
    assert torch.save is checkpoints._save


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".checkpoint.pth.elsewhere-17").write_bytes(b"half")
    (tmp_path / "1epoch.pth").write_bytes(b"whole")
    checkpoints.tidy(tmp_path)
    assert os.listdir(tmp_path) == ["1epoch.pth"]


HOLD = "import sys, pathlib, time; from espnet_pl.bridge.owner import Owner;\
owner = Owner(pathlib.Path(sys.argv[1])); print('mine', flush=True); time.sleep(60)"


@pytest.fixture
def other(tmp_path):
    """Another process that trains in the folder, as the first start of Slurm's job 7."""
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_training_is_kept_out_of_a_folder(other, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match=f"in use: process {other.pid} on"):
        Owner(tmp_path)
    other.kill()
    other.wait()
    Owner(tmp_path).leave()  # free as soon as the process is gone


@pytest.mark.parametrize("job, start", [("7", "0"), ("8", "1")])
def test_only_a_later_start_of_the_same_job_takes_over(job, start, other, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", start)
    with pytest.raises(ConfigError, match="in use"):
        Owner(tmp_path)


def test_the_first_copy_of_a_job_finds_that_it_was_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = Owner(tmp_path)
    first.check()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    second = Owner(tmp_path)
    second.check()
    with pytest.raises(TakenOverError, match="was taken over by process"):
        first.check()
    assert json.loads((tmp_path / ".owner").read_text())["start"] == 1


@pytest.fixture
def options(tmp_path):
    """Of a training, with files."""
    (tmp_path / "wav.scp").write_text("a /here/a.wav\nb /here/b.wav\n")
    (tmp_path / "text").write_text("a ONE\nb TWO\n")
    data = [(f"{tmp_path}/wav.scp", "speech", "sound"), (f"{tmp_path}/text", "text", "text")]
    return argparse.Namespace(
        method="slimipl", method_conf={"capacity": 3}, token_list=[str(i) for i in range(300)],
        train_data_path_and_name_and_type=data, train_shape_file=[f"{tmp_path}/text"],
        max_epoch=3, ngpu=0, dist_rank=1, use_amp=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, names",
    [
        (dict(max_epoch=9, ngpu=2, dist_rank=0, use_tensorboard=True), ""),
        (dict(method="mpl"), "method: 'slimipl' -> 'mpl'"),
        (dict(method_conf={"capacity": 4}), "method_conf: .*3.* -> .*4"),
        (dict(token_list=["a"] * 300), "token_list: "),
        (dict(use_amp=True), "use_amp: False -> True"),
        ("wav.scp a /there/a.wav\nb /there/b.wav\n", ""),
        ("wav.scp a /here/a.wav\n", "train_data_path_and_name_and_type: speech 2 .* -> speech 1"),
        ("text a ONE\nb TOO\n", "train_data_path_and_name_and_type: .*\n.*train_shape_file"),
    ],
)
def test_another_training_is_told_by_name(change, names, options, tmp_path):
    before = fits.traits(options)
    if isinstance(change, str):
        file, _, content = change.partition(" ")
        (tmp_path / file).write_text(content)
    else:
        vars(options).update(change)
    if not names:
        fits.check(before, fits.traits(options), tmp_path)
        return
    with pytest.raises(ConfigError, match=f"is of another training:\n.*{names}"):
        fits.check(before, fits.traits(options), tmp_path)
