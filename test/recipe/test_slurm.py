"""Slurm's options, states and jobs, as far as no Slurm is needed to see them."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from espnet_pl.recipe import launch, markers, slurm, slurm_conf, slurm_job, task
from espnet_pl.recipe.launch import Job, LaunchError
from test.recipe import slurm_jobs
from test.recipe.slurm_jobs import ROOT, meanwhile, run, shell, submitted, text, training, when

recipe = slurm_jobs.recipe  # fixture


def lines(job, conf=None, opts=""):
    if conf is not None:
        Path("conf/slurm.conf").write_text(conf)
    return " ".join(slurm.Site(opts).lines(job))


def test_needs_become_options():
    plain = lines(shell("train a seed 1", "true"))
    assert "--export=PATH" in plain and "-p cpu" in plain and "--job-name train_a_seed_1" in plain
    assert "--output log/train_a_seed_1.log --open-mode append" in plain
    assert "--requeue" in plain and "--signal=B:USR2@120" in plain
    large = lines(shell("b", "true", gpus=2, nodes=3, tasks=4, cpus=5))
    for option in ("-p gpu --gres=gpu:2", "--nodes 3", "--cpus-per-task 5", "--ntasks-per-node 4"):
        assert option in large, option


def test_a_file_of_a_site_is_understood():
    conf = (
        "# ours\ncommand mysbatch --export=ALL --no-requeue\noption time=* --time $0 # a comment\n"
        "default time=4:00:00\noption gpu=1 -p small --gres=gpu:1\noption gpu=* -p large -G $0\n"
        "command  mysbatch --export=ALL --no-requeue --signal=B:USR2@300\n"
    )
    one, eight = shell("a", "true", gpus=1), shell("a", "true", gpus=8)
    assert slurm_conf.parse(_written(conf))[0][0] == "mysbatch"
    assert "-p small --gres=gpu:1" in lines(one) and "-p large -G 8" in lines(eight)
    assert "--time 4:00:00" in lines(one)
    assert "--requeue" not in lines(one).split() and "USR2@120" not in lines(one)
    ours = lines(one, opts="--time 0:10:00 -A 'my lab'")
    assert ours.index("--time 0:10:00 -A 'my lab'") > ours.index("--time 4:00:00")


def _written(conf):
    Path("conf/slurm.conf").write_text(conf)
    return Path("conf/slurm.conf")


@pytest.mark.parametrize(
    "conf, message",
    [
        ("command sbatch\nopton gpu=0\n", r"conf/slurm.conf:2: not understood: opton gpu=0"),
        ("option gpu=0\n", r"a needs gpu=1, and conf/slurm.conf .* add 'option gpu=\* ... \$0'"),
        ("default mem=2G\noption gpu=*\n", "a needs mem=2G"),
        (None, "no conf/slurm.conf; copy it from another recipe"),
    ],
)
def test_a_file_that_does_not_say_enough_is_refused(conf, message):
    Path("conf/slurm.conf").unlink()
    with pytest.raises(LaunchError, match=message):
        lines(shell("a", "true", gpus=1), conf)


def test_a_machine_without_slurm_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match="no sbatch and no squeue here"):
        run(shell("a", "true"))
    assert not Path("log").exists()


def test_many_nodes_are_for_slurm():
    with pytest.raises(LaunchError, match="2 nodes x 1 tasks: --cmd slurm"):
        launch.run([shell("a", "true", nodes=2)])


def answers(monkeypatch, **said):
    """In place of Slurm's programs; None: it fails, as sacct does without accounting."""

    def ask(program, *_):
        answer = said.get(program)
        return subprocess.CompletedProcess([], int(answer is None), answer or "", "")

    monkeypatch.setattr(slurm_job, "ask", ask)


def watched(number):
    watcher = slurm.Watcher()
    assert not watcher.silence
    for _ in range(slurm.MISSED):
        found = watcher.get_info(number, mode="force").get("State")
        time.sleep(0.01)  # two questions within a millisecond are one
    return found, watcher.is_done(number, mode="cache")


HEAD = "JOBID|STATE|NODELIST|REASON\n"


@pytest.mark.parametrize(
    "squeue, sacct, expected",
    [
        (f"{HEAD}7|RUNNING|n1|None\n", None, ("RUNNING", False)),
        (f"{HEAD}7|CONFIGURING|n1|None\n", None, ("CONFIGURING", False)),
        (f"{HEAD}7|REQUEUE_HOLD||job requeued in held state\n", None, ("REQUEUE_HOLD", False)),
        (f"{HEAD}7|CANCELLED|n1|None\n", None, ("CANCELLED", True)),
        (HEAD, None, ("VANISHED", True)),
        (HEAD, "JobID|State|NodeList\n", ("VANISHED", True)),
        (HEAD, "JobID|State|NodeList\n7|CANCELLED by 1000|n1\n", ("CANCELLED", True)),
        (None, None, (None, False)),  # slurmctld does not answer: nothing is known, nothing is over
    ],
)
def test_states_without_and_with_accounting(monkeypatch, squeue, sacct, expected):
    answers(monkeypatch, squeue=squeue, sacct=sacct)
    assert watched("7") == expected


def test_a_silent_slurm_is_told_of_and_waited_for(monkeypatch, capsys):
    answers(monkeypatch, squeue=None)
    job = shell("a", "true")
    submitted(job, job="7")
    job.log.touch()

    seen = []

    def shown():
        seen.append(capsys.readouterr().out)
        return "".join(seen)

    def come_back():
        when(lambda: "waits: squeue does not answer" in shown())
        markers.write(job.marker, {**markers.read(job.marker), "state": "done"})

    monkeypatch.setattr(slurm.Site, "refuse_without_slurm", lambda self: None)
    done = meanwhile(come_back)
    assert run(job) == ["a"]
    done()
    assert "found Slurm job 7 (UNKNOWN)" in shown()


def start(job, restart=0):
    """The process that Slurm would start for a job."""
    code = (
        "import pickle, sys; from espnet_pl.recipe import slurm_job; slurm_job.FENCE = 1.0\n"
        "pickle.load(sys.stdin.buffer)()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7", "PATH": os.defpath}
    env["SLURM_RESTART_COUNT"] = str(restart)
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(pickle.dumps(slurm_job.Command(job, "folder")))
    process.stdin.close()
    return process


def test_a_copy_on_a_lost_node_ends_when_another_has_started():
    job = shell("a", "echo $$ > pid; while :; do echo x >> written; sleep 0.1; done")
    submitted(job)
    first = start(job)
    pid = int(when(lambda: text("pid").strip()))
    submitted(job, restart=1)  # as the second copy says, somewhere else
    assert first.wait(20) == 0
    assert "another copy has taken over" in first.stdout.read().decode()
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
    size = Path("written").stat().st_size
    time.sleep(0.5)
    assert Path("written").stat().st_size == size
    assert markers.read(job.marker)["slurm"]["restart"] == 1


def test_a_second_copy_waits_for_the_first_to_see_it():
    """Both on one machine, as after the loss of slurmd alone."""
    job = shell("a", "echo start >> starts; test $(wc -l < starts) = 2 || sleep 60")
    submitted(job)
    first = start(job)
    when(lambda: text("starts"))
    second = start(job, restart=1)
    assert (first.wait(30), second.wait(30)) == (0, 0)
    assert text("starts") == "start\nstart\n"
    assert markers.read(job.marker)["state"] == "done" and not job.why()


def test_an_older_start_and_an_older_submission_do_not_begin():
    job = shell("a", "touch x")
    submitted(job, restart=2)
    assert start(job, restart=1).wait(20) == 0
    record = submitted(job)
    markers.write(job.marker, {**record, "slurm": {"folder": "newer"}})
    assert start(job).wait(20) == 0
    assert not Path("x").exists()


def test_what_changed_in_the_queue_is_not_run():
    Path("conf.yaml").write_text("a: 1\n")
    job = shell("a", "touch x", inputs=(Path("conf.yaml"),))
    submitted(job)
    Path("conf.yaml").write_text("a: 2\n")
    assert start(job).wait(20) == 1
    assert "conf.yaml: a: 1 -> 2" in markers.read(job.marker)["reason"] and not Path("x").exists()


def test_this_machine_leaves_alone_what_slurm_may_still_do(monkeypatch):
    job = shell("a", "touch x")
    submitted(job, job="7")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    with pytest.raises(LaunchError, match=r"no squeue here to ask(.|\n)*rm log/a.job.json"):
        launch.run([job])


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """In place of Slurm's programs on the compute node: the job runs, and can be put back."""
    (tmp_path / "bin").mkdir()
    for name, script in {"squeue": "echo RUNNING", "scontrol": 'echo "$@" >> asked'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setattr(os, "defpath", f"{tmp_path}/bin:{os.defpath}")


def stopped_once_too_often(job):
    """Told to stop as soon as it says that it is up, in more turns than may be fruitless."""
    submitted(job)
    for turn in range(slurm_job.FRUITLESS + 1):
        process = start(job, restart=turn)
        when(lambda turn=turn: text(job.log).count("up\n") == turn + 1)
        process.send_signal(signal.SIGUSR2)
        assert process.wait(20) == 128 + signal.SIGTERM


def test_what_saves_nothing_is_not_put_back_for_ever(stand_ins):
    """A time limit that is too short would keep the queue busy, and never come to an end."""
    job = training(1000)
    Path("training.py").write_text("print('up', flush=True); import time; time.sleep(60)\n")
    stopped_once_too_often(job)
    assert text("asked") == "requeue 7\n" * slurm_job.FRUITLESS
    marker = markers.read(job.marker)
    assert marker["state"] == "failed" and "before it had saved anything" in marker["reason"]


def test_a_checkpoint_since_the_start_is_progress(stand_ins):
    """Of a training that does not hear the signal, and saves at the end of an epoch."""
    job = training(1000)
    script = "echo 1 > run/checkpoint.pth; echo up; exec sleep 60"
    job = Job(job.name, ("sh", "-c", script), job.log, resumes=job.resumes)
    stopped_once_too_often(job)
    assert text("asked") == "requeue 7\n" * (slurm_job.FRUITLESS + 1)
    assert markers.read(job.marker)["state"] == markers.SUBMITTED


def test_a_cluster_that_puts_nothing_back_is_told_of(stand_ins, tmp_path):
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\necho disabled >&2; exit 1\n")
    job = training(1000)
    submitted(job)
    process = start(job)
    when(lambda: "from 0" in text(job.log))
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == task.AGAIN
    assert "did not put it back: disabled" in markers.read(job.marker)["reason"]


def test_dry_run_touches_nothing(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # a machine without Slurm can print
    before = sorted(Path(".").rglob("*"))
    assert run(training(3), shell("b", "true", here=True), dry_run=True) == []
    assert sorted(Path(".").rglob("*")) == before
    out = capsys.readouterr().out
    assert "#SBATCH --signal=B:USR2@120" in out and "exec python3 training.py 3" in out
    assert out.endswith("# b -> log/b.log\nsh -c true\n")
    assert str(Path.cwd()) not in out and sys.executable not in out
