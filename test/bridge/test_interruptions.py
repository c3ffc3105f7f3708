"""tools/interruptions.py: trainings that are disturbed end as those that are not, or it says so."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from espnet_pl.bridge import checkpoints
from tools import interruptions

ROOT = Path(__file__).parents[2]
OPTIONS = "--max_epoch 2 --save_interval 2"


def run(mode, exp, work, times, more=""):
    argv = [sys.executable, "tools/interruptions.py", mode, str(exp), "--times", str(times)]
    argv += ["--work", str(work), "--options", OPTIONS + more, "--record", str(work) + ".json"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(Path(str(work) + ".json").read_text())[0]


@pytest.mark.parametrize("mode, words", [("kill", "killed"), ("stop", "stop"), ("damage", "dam")])
def test_disturbed_trainings_end_as_undisturbed_ones(mode, words, exp, tmp_path):
    counts = run(mode, exp, tmp_path / "work", 3)
    assert counts["disturbed"] == 3 and counts["wrong"] == [] and counts["finished"] >= 1
    assert all(what.startswith(words) for what in counts["happened"])
    assert counts["again_most"] <= (2 if mode == "kill" else 0 if mode == "stop" else 4)


@pytest.mark.parametrize("mode", ["kill", "stop"])
def test_two_processes_go_on_together(mode, exp, tmp_path):
    counts = run(mode, exp, tmp_path / "work", 1, " --num_processes 2")
    assert counts["disturbed"] == 1 and counts["wrong"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_costs_nothing_but_time(exp, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    subprocess.run(["umount", tmp_path], check=True)
    counts = run("full", exp, tmp_path / "work", 2)
    assert counts["happened"] == {"disk full": 2} and counts["wrong"] == []


def test_what_checkpoints_cost_is_measured(exp, tmp_path):
    argv = [sys.executable, "tools/bench/checkpoints.py", str(exp), "--repeat", "4"]
    argv += ["--json", str(tmp_path / "figures.json")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "figures.json").read_text())
    assert 0 < found["s to go on"] < found["s to the first update"]
    assert found["s of a save"] > 0 and found["MB of a checkpoint"] > 0.01
    assert f"s of a save: {found['s of a save']:.3g}" in done.stdout


@pytest.fixture
def pair(tmp_path):
    """Two folders of finished trainings that are alike, with their logs."""
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
        states = dict.fromkeys(("schedulers", "scaler", "gradients"))
        states |= {"model": {"w": torch.zeros(2)}, "optimizers": [torch.ones(1)], "epoch": 2}
        checkpoints.write(states | {"step": 0}, folder / "checkpoint.pth")
        torch.save({"w": torch.zeros(2)}, folder / "1epoch.pth")
        log = f"1epoch:train:1-1batch: iter_time={folder.stat().st_ino}, loss=1.0, train_time=3\n"
        folder.with_name(f"{folder.name}.log").write_text(log)
    return folders


@pytest.mark.parametrize(
    "harm, found",
    [
        (lambda folder: None, []),
        (lambda folder: (folder / "1epoch.pth").unlink(), ["names of models", "1epoch.pth"]),
        (lambda folder: torch.save({"w": -torch.zeros(2)}, folder / "1epoch.pth"), ["1epoch.pth"]),
        (
            lambda folder: folder.with_name("parts.log").write_text("1epoch:train:1-1batch: l=2"),
            ["log of 1 1"],
        ),
        (
            lambda folder: checkpoints.write(
                checkpoints.read(folder / "checkpoint.pth") | {"model": {"w": torch.ones(2)}},
                folder / "checkpoint.pth",
            ),
            ["checkpoint: model"],
        ),
    ],
)
def test_a_difference_is_found(harm, found, pair):
    whole, parts = pair
    harm(parts)
    assert interruptions.differences(whole, parts) == found


def test_damage_is_always_seen(pair, tmp_path):
    draw = random.Random(0)
    for _ in range(30):
        path = tmp_path / "checkpoint.pth"
        shutil.copy(pair[0] / "checkpoint.pth", path)
        interruptions.damage(path, draw)
        with pytest.raises(checkpoints.DamagedError):
            checkpoints.read(path)
