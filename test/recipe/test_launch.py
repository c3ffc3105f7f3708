"""Jobs: in the order of their files, side by side, stopped, told, and never mixed."""

import fcntl
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from espnet_pl.recipe import launch, markers, progress
from espnet_pl.recipe.launch import Job, LaunchError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Asks git and nvidia-smi; not what is tested here.
    monkeypatch.setattr(markers, "environment", lambda: {"commit": "none"})


def shell(name, script, **more):
    return Job(name, ("sh", "-c", script), Path(f"log/{name.replace(' ', '_')}.log"), **more)


def test_failure_shows_the_end_of_the_log_and_the_command():
    job = shell("train a", "seq 100; echo oops >&2; exit 3", env={"x": "1 2"})
    with pytest.raises(LaunchError) as error:
        launch.run([job])
    text = str(error.value)
    assert "exit code 3" in text and "oops" in text and str(job.log) in text
    assert "x='1 2' sh -c 'seq 100; echo oops >&2; exit 3'" in text
    assert "\n    100\n" in text and "\n    80\n" not in text


def test_failure_names_the_signal_and_what_is_not_written():
    with pytest.raises(LaunchError, match=r"killed by SIGKILL \(out of memory\?\)"):
        launch.run([shell("a", "kill -9 $$")])
    with pytest.raises(LaunchError, match="did not write no.txt"):
        launch.run([shell("b", "true", outputs=(Path("no.txt"),))])
    with pytest.raises(LaunchError, match="missing no.txt"):
        launch.run([shell("c", "true", inputs=(Path("no.txt"),))])
    with pytest.raises(LaunchError, match="cannot start"):
        launch.run([Job("d", ("./no-such-program",), Path("d.log"))])


def test_a_failure_stops_what_waits_for_it_or_all_there_is():
    jobs = [
        shell("bad", "exit 3", outputs=(Path("a"),)),
        shell("worse", "exit 4"),
        shell("after", "touch b", inputs=(Path("a"),), outputs=(Path("b"),)),
        shell("last", "touch c", inputs=(Path("b"),), outputs=(Path("c"),)),
        shell("good", "echo 1 > d", outputs=(Path("d"),)),
        shell("next", "cat d > e", inputs=(Path("d"),), outputs=(Path("e"),)),
    ]
    with pytest.raises(LaunchError, match=r"bad failed .*exit code 3") as error:
        launch.run(jobs)
    assert "exit code 4" not in str(error.value) and not Path("d").exists()
    with pytest.raises(LaunchError, match=r"(?s)bad failed .*exit code 3.*worse failed.*code 4"):
        launch.run(jobs, keep_going=True)
    assert Path("e").exists() and not Path("b").exists() and not Path("c").exists()


def test_what_is_lost_to_a_failure_is_said(capsys):
    jobs = [
        shell("bad", "exit 3", outputs=(Path("a"),)),
        shell("after", "touch b", inputs=(Path("a"),), outputs=(Path("b"),)),
    ]
    with pytest.raises(LaunchError):
        launch.run(jobs, keep_going=True)
    printed = capsys.readouterr().out
    assert "FAILED: bad; the others go on" in printed
    assert "not run, as they wait for what failed: after" in printed


def test_files_give_the_order():
    first = shell("first", "sleep 0.3; echo 1 > a", outputs=(Path("a"),))
    second = shell("second", "cat a > b", inputs=(Path("a"),), outputs=(Path("b"),))
    third = shell("third", "cat b > c", inputs=(Path("b"),), outputs=(Path("c"),))
    assert launch.run([first, second, third], nj=3) == ["first", "second", "third"]
    assert Path("c").read_text() == "1\n"


def test_jobs_run_side_by_side():
    """Each waits for the other: one at a time would never end."""
    script = "touch {0}; for i in $(seq 100); do test -e {1} && exit 0; sleep 0.05; done; exit 1"
    jobs = [shell(a, script.format(a, b)) for a, b in (("a", "b"), ("b", "a"))]
    assert sorted(launch.run(jobs, nj=2)) == ["a", "b"]


def test_one_at_a_time():
    script = "mkdir lock && sleep 0.1 && rmdir lock"
    assert len(launch.run([shell(name, script) for name in "abc"], nj=1)) == 3


def test_waiting_jobs_are_not_asked_again_and_again(monkeypatch):
    """A long study waited at a fifth of a core: it read every file at each look at its children."""
    asked, why = [], Job.why
    monkeypatch.setattr(Job, "why", lambda self: asked.append(self.name) or why(self))
    launch.run([shell(name, "sleep 0.5") for name in "ab"], nj=1)
    assert len(launch.run([shell(name, "sleep 0.5") for name in "ab"], nj=1)) == 0
    # Before it starts, for its line when it does, and when it is asked whether it is up to date.
    assert asked.count("b") <= 4, asked


def test_a_failure_lets_the_others_end_and_starts_nothing_more():
    jobs = [
        shell("bad", "exit 1", outputs=(Path("x"),)),
        shell("good", "sleep 0.5; touch y", outputs=(Path("y"),)),
        shell("needs bad", "true", inputs=(Path("x"),)),
        shell("later", "touch z"),
    ]
    with pytest.raises(LaunchError, match="bad failed"):
        launch.run(jobs, nj=2)
    assert jobs[1].why() == []
    assert not Path("z").exists()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ends_the_children(sign):
    """Also the child's child, which holds the shell's output open."""
    job = shell("a", "echo $$ > pid; sleep 60 & echo $! >> pid; wait")

    def stop():
        while not Path("pid").exists() or len(Path("pid").read_text().split()) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), sign)

    threading.Thread(target=stop).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch.run([job])
    assert time.monotonic() - began < 20
    assert job.why() == ["it was stopped before"]
    for pid in Path("pid").read_text().split():
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_stopped_child_may_save_its_state():
    job = shell(
        "a", "trap 'echo saved > state; exit 0' TERM; touch up; while :; do sleep 0.1; done"
    )

    def stop():
        while not Path("up").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        launch.run([job])
    assert Path("state").read_text() == "saved\n"


def test_a_training_that_was_stopped_from_outside_says_that_it_has_saved():
    job = shell("train a", "touch state; exit 75", resumes=Path("state"))
    with pytest.raises(LaunchError, match="saved its state; the same command continues it"):
        launch.run([job])
    with pytest.raises(LaunchError, match="exit code 75"):
        launch.run([shell("b", "exit 75")])


def test_two_drivers_do_not_share_a_job():
    job = shell("a", "true")
    job.log.parent.mkdir()
    with open(job.log, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match="already running"):
            launch.run([job])


def training(script="echo 1 > run/checkpoint.pth; touch run/done", conf="conf.yaml"):
    return Job(
        "train run", ("sh", "-c", script), Path("run/train.log"), inputs=(Path(conf),),
        outputs=(Path("run/done"),), resumes=Path("run/checkpoint.pth"),
    )  # fmt: skip


def test_a_training_goes_on_from_its_own_checkpoint():
    Path("conf.yaml").write_text("max_epoch: 2\n")
    script = "test -e run/checkpoint.pth && touch run/done; echo 1 > run/checkpoint.pth"
    with pytest.raises(LaunchError):
        launch.run([training(script)])
    spent = markers.read(Path("run/train.job.json"))["wall_s"]
    assert launch.run([training(script)]) == ["train run"]
    assert markers.read(Path("run/train.job.json"))["wall_s"] >= spent


def test_a_training_of_another_configuration_is_refused():
    Path("conf.yaml").write_text("max_epoch: 2\noptim_conf: {lr: 0.1}\n")
    launch.run([training()])
    Path("conf.yaml").write_text("max_epoch: 2\noptim_conf: {lr: 0.2}\n")
    with pytest.raises(LaunchError, match=r"optim_conf.lr: 0.1 -> 0.2(.|\n)*--force"):
        launch.run([training()])
    assert Path("run/done").exists()
    assert launch.run([training()], force={"train run"}) == ["train run"]
    (old,) = Path(".").glob("run.old-*")
    assert (old / "checkpoint.pth").exists() and (old / "train.log").exists()
    assert launch.run([training()]) == []


def test_two_runs_that_go_aside_in_the_same_second_are_kept(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    for content in ("a: 1\n", "a: 2\n", "a: 3\n"):
        Path("conf.yaml").write_text(content)
        assert launch.run([training()], force={"train run"}) == ["train run"]
    assert {path.name for path in Path(".").glob("run.old-*")} == {"run.old-now", "run.old-now-2"}


def test_the_refusal_comes_before_anything_runs():
    """A run whose starting point will be trained again is refused at once, not hours later."""
    Path("conf.yaml").write_text("a: 1\n")
    Path("first.yaml").write_text("a: 1\n")

    def both():
        script = "echo $$ > init/model; echo 1 > init/checkpoint.pth"
        yield Job(
            "train init", ("sh", "-c", script), Path("init/train.log"), 0, (Path("first.yaml"),),
            (Path("init/model"),), resumes=Path("init/checkpoint.pth"),
        )  # fmt: skip
        second = training()
        yield Job(
            second.name, second.argv, second.log, 0, (*second.inputs, Path("init/model")),
            second.outputs, resumes=second.resumes,
        )  # fmt: skip

    launch.run(list(both()))
    before = Path("init/model").read_text()
    with pytest.raises(LaunchError, match="train run: run holds .*\n    train init will run again"):
        launch.run(list(both()), force={"train init"})
    assert Path("init/model").read_text() == before


def test_dry_run_touches_nothing(capsys):
    assert launch.run([shell("a", "touch x")], dry_run=True) == []
    assert list(Path(".").iterdir()) == []
    assert "sh -c 'touch x'" in capsys.readouterr().out


def test_an_unknown_place_is_refused_clearly():
    with pytest.raises(LaunchError, match="--cmd slurm: no conf/slurm.conf"):
        launch.run([shell("a", "touch x")], cmd="slurm")
    with pytest.raises(LaunchError, match="known are local and slurm"):
        launch.run([shell("a", "touch x")], cmd="sge")
    assert not Path("x").exists()


def test_jobs_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    script = "echo $CUDA_VISIBLE_DEVICES > {0}; while ! test -e {1}; do sleep 0.05; done"
    launch.run(
        [shell(a, script.format(a, b), gpus=1) for a, b in (("a", "b"), ("b", "a"))], nj=4
    )  # fmt: skip
    assert {Path("a").read_text(), Path("b").read_text()} == {"3\n", "5\n"}
    with pytest.raises(LaunchError, match="shows 2 GPUs"):
        launch.run([shell("c", "true", gpus=3)])


def test_time_is_written_down_and_told(capsys):
    burn = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    launch.run([Job("train a", ("python3", "-c", burn), Path("exp/a/train.log"))])
    marker = markers.read(Path("exp/a/train.job.json"))
    assert marker["cpu_s"] >= 0.3 and marker["wall_s"] >= 0.3
    launch.run([Job("train b", ("true",), Path("exp/b/train.log"))], history=[Path("exp")])
    took = f"similar jobs took {progress.duration(marker['wall_s'])}"
    assert f"train b: started, log exp/b/train.log, {took}\n" in capsys.readouterr().out


def test_epochs_are_told(capsys):
    log = (
        "1/2epoch started\n"
        "1epoch results: [train] iter_time=0.1, loss=9.0, total_count=3, [valid] loss=8.000, "
        "cer_ctc=0.510, total_count=1, [att_plot] total_count=0\n"
        "2/2epoch started. Estimated time to finish: 1 second\n"
        "2epoch results: [train] loss=5.0, total_count=6, [valid] loss=7.000, cer_ctc=0.310\n"
    )
    Path("log.txt").write_text(log)
    launch.run([Job("train a seed 1", ("cat", "log.txt"), Path("exp/a/train.log"))])
    out = capsys.readouterr().out
    assert "a seed 1: epoch 1/2, valid cer_ctc 0.510, 0.0 s left\n" in out
    assert "a seed 1: epoch 2/2, valid cer_ctc 0.310\n" in out
    assert "\r" not in out  # not a terminal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (12.4, "12 s"),
        (185, "3 min 05 s"),
        (7440, "2 h 04 min"),
        (59.7, "1 min 00 s"),
    ],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_python3_is_this_python():
    code = "import sys; print(sys.executable)"
    launch.run([Job("a", ("python3", "-c", code), Path("a.log"))])
    assert Path("a.log").read_text().splitlines()[-1] == sys.executable
