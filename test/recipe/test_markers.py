"""When a job runs again, and what is written down about one that ran."""

import os
import subprocess
from pathlib import Path

import pytest

from espnet_pl.recipe import launch, local, markers
from espnet_pl.recipe.launch import Job, LaunchError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Asks git and nvidia-smi; not what is tested here.
    monkeypatch.setattr(markers, "environment", lambda: {"commit": "none"})


def shell(name, script, **more):
    return Job(name, ("sh", "-c", script), Path(f"log/{name.replace(' ', '_')}.log"), **more)


def copy(**more):
    """Writes out.txt from in.txt and counts its runs."""
    script = "cat in.txt > out.txt; echo x >> runs.txt"
    files = {"inputs": (Path("in.txt"),), "outputs": (Path("out.txt"),)}
    return shell("copy", script, **{**files, **more})


def runs():
    return len(Path("runs.txt").read_text().split())


def test_runs_once():
    Path("in.txt").write_text("1")
    assert launch.run([copy()]) == ["copy"]
    assert launch.run([copy()]) == []
    assert runs() == 1


def test_runs_again_when_an_input_changes_and_not_when_only_its_time_does():
    Path("in.txt").write_text("1")
    launch.run([copy()])
    os.utime("in.txt", (1, 1))
    assert launch.run([copy()]) == []
    Path("in.txt").write_text("2")
    assert launch.run([copy()]) == ["copy"]
    assert Path("out.txt").read_text() == "2"


@pytest.mark.parametrize("change", ["argv", "env", "output", "force"])
def test_runs_again_for_every_reason(change):
    Path("in.txt").write_text("1")
    launch.run([copy()])
    job, force = copy(), ()
    if change == "argv":
        job = Job("copy", ("sh", "-c", "echo new > out.txt"), job.log, 0, job.inputs, job.outputs)
    elif change == "env":
        job = copy(env={"a": "b"})
    elif change == "output":
        Path("out.txt").unlink()
    else:
        force = {"copy"}
    assert launch.run([job], force=force) == ["copy"]


def test_how_many_at_a_time_is_no_reason():
    def job(nj):
        words = "echo", "--nj", nj, "--ngpu", nj, *(["--num_processes", nj] if nj != "1" else [])
        return Job("a", words, Path("a.log"))

    launch.run([job("1")])
    assert launch.run([job("7")]) == []


def test_of_a_yaml_only_the_meaning_counts():
    job = shell("a", "true", inputs=(Path("a.yaml"),))
    Path("a.yaml").write_text("x: 1\nrecipe: {init: b}\n")
    launch.run([job])
    Path("a.yaml").write_text("# a comment\nx:    1\nrecipe: {export: teacher}\n")
    assert launch.run([job]) == []
    Path("a.yaml").write_text("x: 2\n")
    assert job.why() == ["a.yaml: x: 1 -> 2"]


def test_a_failed_job_runs_again():
    job = shell("a", "test -e good")
    with pytest.raises(LaunchError):
        launch.run([job])
    Path("good").touch()
    assert launch.run([job]) == ["a"]


def test_a_torn_marker_is_none(monkeypatch):
    job = shell("a", "true")
    launch.run([job])
    job.marker.write_text(job.marker.read_text()[:40])
    assert launch.run([job]) == ["a"]


def test_an_interrupted_write_leaves_the_old_marker(monkeypatch):
    markers.write(Path("m.json"), {"state": "done"})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError):
        markers.write(Path("m.json"), {"state": "failed"})
    assert markers.read(Path("m.json")) == {"state": "done"}


def test_killed_while_running_is_not_done(monkeypatch):
    """The marker says so from the start: nothing is left to be written by who was killed."""
    Path("in.txt").write_text("1")
    launch.run([copy()])
    Path("in.txt").write_text("2")
    seen = []
    poll = local.Task.poll

    def look(task):
        seen.append(markers.read(task.job.marker)["state"])
        return poll(task)

    monkeypatch.setattr(local.Task, "poll", look)
    launch.run([copy()])
    assert set(seen) == {"was interrupted"}


def test_the_commit_is_of_this_code_and_says_what_is_not_in_it(monkeypatch):
    code, results = Path("repo/pkg/markers.py").resolve(), Path("repo/egs/RESULTS.md")
    of_a_study = Path("repo/docs/studies/data/soft/toy.hard.1.json")
    for path in (code, results, of_a_study):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    monkeypatch.setattr(markers, "__file__", str(code))

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", "repo", *who, *words], check=True, capture_output=True)

    git("init")
    assert markers.commit() == "unknown"  # nothing in it yet
    git("add", "egs")
    git("commit", "-m", "something else")
    assert markers.commit() == "unknown"
    git("add", ".")
    git("commit", "-m", "the code")
    assert len(markers.commit()) == 12
    results.write_text("2")
    of_a_study.write_text("2")
    assert len(markers.commit()) == 12  # results are made after their commit
    code.write_text("2")
    assert markers.commit().endswith(" + local changes")
