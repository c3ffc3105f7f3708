"""Jobs for the tests of Slurm: small ones, and a training in small."""

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from espnet_pl.recipe import launch, markers
from espnet_pl.recipe.launch import Job

ROOT = Path(__file__).parents[2]

# A training in small: it counts, and on a signal saves and asks to be run again.  Its helper, as a
# worker that loads data, would be hurt by a signal.
TRAINING = """
import os, pathlib, signal, subprocess, sys, time
state, told = pathlib.Path("run/checkpoint.pth"), []
hurt = "trap 'touch run/hurt' TERM USR1 USR2; while kill -0 $PPID; do sleep 0.1; done"
helper = subprocess.Popen(["sh", "-c", hurt])
for sign in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(sign, lambda *_: told.append(1))
step = int(state.read_text()) if state.exists() else 0
print("from", step, flush=True)
while step < int(sys.argv[1]):
    time.sleep(0.1)
    step += 1
    if told:
        helper.kill()
        state.write_text(str(step))
        print("saved", step, flush=True)
        sys.exit(75)
helper.kill()
pathlib.Path("run/done").write_text(str(step))
"""


@pytest.fixture(autouse=True)
def recipe(tmp_path, monkeypatch):
    """A folder with the recipes' own conf/slurm.conf."""
    monkeypatch.chdir(tmp_path)
    make_folder()


def make_folder():
    Path("conf").mkdir()
    shutil.copy(ROOT / "egs/mini_alnum/pl1/conf/slurm.conf", "conf/slurm.conf")
    Path("training.py").write_text(TRAINING)


def shell(name, script, **more):
    return Job(name, ("sh", "-c", script), Path(f"log/{name.replace(' ', '_')}.log"), **more)


def training(steps, **more):
    return Job(
        "train run", ("python3", "training.py", str(steps)), Path("run/train.log"),
        inputs=(Path("conf/slurm.conf"),), outputs=(Path("run/done"),),
        resumes=Path("run/checkpoint.pth"), **more,
    )  # fmt: skip


def run(*jobs, opts="", **more):
    if "--nodelist" not in opts:
        opts += " --exclude n3"  # which is for `limits`: a test may take its node down
    return launch.run(jobs, "slurm", nj=8, opts=opts, **more)


def command(*argv):
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def number(job):
    """The Slurm job of a job, once it has been submitted."""
    return when(lambda: (markers.read(job.marker) or {}).get("slurm", {}).get("job"))


def when(found, seconds=60):
    """What a question answers, as soon as it does."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)
    return answer


def meanwhile(*steps):
    """Does something in a thread while the driver waits; afterwards says what went wrong there."""
    wrong = []

    def body():
        try:
            for step in steps:
                step()
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=body)
    thread.start()

    def done():
        thread.join(60)
        assert not thread.is_alive() and not wrong, wrong

    return done


def text(path):
    return Path(path).read_text() if Path(path).exists() else ""


def state(id):
    return command("squeue", "--noheader", "--states=all", "--jobs", id, "--format=%T").strip()


def submitted(job, /, **own):
    """The marker of a job as its submission leaves it."""
    fields = {
        "name": job.name,
        "fingerprint": markers.fingerprint(job),
        "wall_s": 0.0,
        "cpu_s": 0.0,
    }
    record = {**fields, "state": markers.SUBMITTED, "slurm": {"folder": "folder", **own}}
    markers.write(job.marker, record)
    return record
