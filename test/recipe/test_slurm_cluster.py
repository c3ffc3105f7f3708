"""Jobs in a real Slurm of this machine: two nodes, fake GPUs, no accounting (tools/slurm_local.sh).

Skipped where Slurm is not installed and cannot be; with ESPNET_PL_SLURM=required that is an error.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from espnet_pl.recipe import launch, markers
from espnet_pl.recipe.launch import Job, LaunchError
from test.bridge import conftest as bridge
from test.bridge.test_train import same
from test.recipe import slurm_jobs
from test.recipe.slurm_jobs import (
    ROOT,
    TRAINING,
    command,
    make_folder,
    meanwhile,
    number,
    run,
    shell,
    state,
    submitted,
    text,
    training,
    when,
)

# Fixtures: real trainings, and a recipe.
arguments, corpus, recipe = bridge.arguments, bridge.corpus, slurm_jobs.recipe
LOCAL = ROOT / "tools/slurm_local.sh"


def limited():
    """What reaches its time limit: a training, and a job that cannot save."""
    return training(1000), shell("infer whole", "sleep 300")


def limits():
    """A driver of its own: time limits take minutes, in which the other tests run."""
    make_folder()
    saves, whole = limited()
    # The first turn ends at the notice; what is left takes some seconds.
    meanwhile(
        lambda: when(lambda: "saved" in text(saves.log), 120),
        lambda: Path("run/checkpoint.pth").write_text("980"),
    )
    try:
        run(saves, whole, opts="--time 1 --signal=B:USR2@20 --nodelist n3")
    except LaunchError as error:
        sys.exit(str(error))


@pytest.fixture(scope="session")
def cluster(request, tmp_path_factory):
    """A Slurm of its own for these tests: two nodes, and one for `limits`."""
    lost = [name for name in ("munged", "slurmctld", "slurmd") if not _program(name)]
    if lost and os.environ.get("ESPNET_PL_SLURM") != "required":
        pytest.skip(f"no {', '.join(lost)}: tools/slurm_local.sh install")
    folder = Path(f"/tmp/slurm_test.{os.getpid()}")
    env = {**os.environ, "SLURM_LOCAL_DIR": str(folder), "SLURM_LOCAL_NODES": "3"}
    started = subprocess.run([LOCAL, "start"], env=env, capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "etc/slurm.conf")
    driver, cwd = None, tmp_path_factory.mktemp("limits")
    if any(item.name == "test_time_limits" for item in request.session.items):
        driver = subprocess.Popen(
            [sys.executable, "-c", "from test.recipe import test_slurm_cluster as t; t.limits()"],
            cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    yield driver, cwd
    if driver and driver.poll() is None:
        driver.kill()
    os.environ.pop("SLURM_CONF")
    if before:
        os.environ["SLURM_CONF"] = before
    subprocess.run([LOCAL, "stop"], env=env, capture_output=True, check=True)
    shutil.rmtree(folder)


def _program(name):
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def test_files_give_the_order_and_the_rest_runs_side_by_side(cluster, capsys):
    """Two jobs wait for each other: one at a time would never end."""
    script = "touch {0}; for i in $(seq 300); do test -e {1} && exit 0; sleep 0.1; done; exit 1"
    jobs = [
        shell("a", script.format("a", "b"), outputs=(Path("a"),)),
        shell("b", script.format("b", "a"), outputs=(Path("b"),)),
        shell("c", 'sleep 0.2; test -e a && echo "$word $SLURM_JOB_ID" > c', inputs=(Path("a"),),
              outputs=(Path("c"),), env={"word": "two words"}),
        shell("here", "echo ${SLURM_JOB_ID:-none} > d", inputs=(Path("c"),), here=True,
              outputs=(Path("d"),)),
    ]  # fmt: skip
    names = run(*jobs)
    assert sorted(names[:2]) == ["a", "b"] and names[2:] == ["c", "here"]
    marker = markers.read(jobs[2].marker)
    id = marker["slurm"]["job"]
    assert text("c") == f"two words {id}\n" and text("d") == "none\n"
    assert marker["wall_s"] > 0 and marker["environment"]["python"] and marker["state"] == "done"
    out = capsys.readouterr().out
    assert f"c: Slurm job {id}, log log/c.log" in out
    assert re.search(rf"c: done in .*, Slurm job {id}\n", out)
    assert not Path("log/c.slurm").exists()  # what submitting needed
    # It is done for either backend.
    assert run(*jobs) == [] and launch.run(jobs) == []


def test_a_failure_shows_the_end_of_the_log_and_the_command(cluster):
    job = shell("train a", "seq 100; echo oops >&2; exit 3", env={"x": "1 2"})
    with pytest.raises(LaunchError) as error:
        run(job)
    shown, id = str(error.value), markers.read(job.marker)["slurm"]["job"]
    assert f"exit code 3 (Slurm job {id})" in shown and "oops" in shown and "    100\n" in shown
    assert "x='1 2' sh -c 'seq 100; echo oops >&2; exit 3'" in shown
    when(lambda: state(id) == "FAILED")
    assert "ExitCode=3:0" in command("scontrol", "show", "job", id)
    killed = shell("b", "kill -9 $$")
    with pytest.raises(LaunchError, match=r"killed by SIGKILL \(out of memory\?\)"):
        run(killed)
    with pytest.raises(LaunchError, match="did not write no.txt"):
        run(shell("c", "true", outputs=(Path("no.txt"),)))
    assert job.why() == ["it failed before"]


def test_what_sbatch_refuses_is_told(cluster):
    job = shell("a", "true")
    with pytest.raises(
        LaunchError, match=r"a: not submitted: (.|\n)*invalid partition(.|\n)*-p no"
    ):
        run(job, opts="-p nosuch")
    assert run(job) == ["a"]


def test_a_reason_to_wait_is_told(cluster, capsys):
    job = shell("a", "true")
    seen = []

    def release():
        when(lambda: seen.append(capsys.readouterr().out) or "waits: JobHeldUser" in "".join(seen))
        command("scontrol", "release", re.search(r"Slurm job (\d+)", "".join(seen))[1])

    done = meanwhile(release)
    assert run(job, opts="--hold") == ["a"]
    done()


def test_gpus_are_slurms(cluster):
    jobs = [
        shell(
            f"g{n}", f"echo $CUDA_VISIBLE_DEVICES > {n}; sleep 1", gpus=n, outputs=(Path(f"{n}"),)
        )
        for n in (1, 2)
    ]
    run(*jobs)
    assert text("2") == "0,1\n" and text("1").strip() in ("0", "1")


def test_two_nodes_with_two_processes_each(cluster):
    """torch's own collective over gloo, as a training would use it."""
    Path("ranks.py").write_text(
        "import os, torch, torch.distributed as dist\n"
        "rank, size = (int(os.environ[f'SLURM_{n}']) for n in ('PROCID', 'NTASKS'))\n"
        "dist.init_process_group('gloo', 'file://' + os.path.abspath('meet'), rank=rank,"
        " world_size=size)\n"
        "x = torch.tensor([rank + 1.0]); dist.all_reduce(x)\n"
        "open(f'sum.{rank}', 'w').write(f'{x.item()} {os.environ[\"SLURMD_NODENAME\"]}')\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    job = Job("train ranks", ("python3", "ranks.py"), Path("log/r.log"), nodes=2, tasks=2)
    assert run(job) == ["train ranks"]
    found = [text(f"sum.{rank}").split() for rank in range(4)]
    assert [total for total, _ in found] == ["10.0"] * 4
    assert len({found[0][1], found[2][1]}) == 2 and found[0][1] == found[1][1]
    bad = Job("bad", ("sh", "-c", "exit $SLURM_PROCID"), Path("log/b.log"), nodes=2, tasks=2)
    with pytest.raises(LaunchError, match="exit code 3"):
        run(bad)


def test_ranks_are_told_to_save_and_come_back(cluster):
    Path("rank.py").write_text(
        re.sub("(?m)^(hurt|helper).*|helper.kill.*", "", TRAINING)
        .replace("run/", "run/'+os.environ['SLURM_PROCID']+'")
        .replace('"', "'")
    )
    job = Job(
        "train ranks", ("python3", "rank.py", "50"), Path("run/train.log"), nodes=2, tasks=2,
        resumes=Path("run/0checkpoint.pth"),
    )  # fmt: skip
    done = meanwhile(
        lambda: when(lambda: text(job.log).count("from 0") == 4),
        lambda: time.sleep(1),
        lambda: command("scancel", "--batch", "--signal=USR2", number(job)),
    )
    assert run(job) == ["train ranks"]
    done()
    assert [text(f"run/{rank}done") for rank in range(4)] == ["50"] * 4
    assert text(job.log).count("saved") == 4 and text(job.log).count("from 0") == 4


def test_a_training_that_is_told_saves_and_goes_on(cluster, capsys):
    """The notice before preemption or the time limit: not to what the training has started."""
    job = training(60)
    done = meanwhile(
        lambda: when(lambda: "from 0" in text(job.log)),
        lambda: time.sleep(1),
        lambda: command("scancel", "--batch", "--signal=USR2", number(job)),
    )
    assert run(job) == ["train run"]
    done()
    log = text(job.log)
    saved = int(re.search(r"saved (\d+)", log)[1])
    assert not Path("run/hurt").exists()
    assert 0 < saved < 60 and f"from {saved}\n" in log  # appended to what the first start wrote
    assert "start 1" in log and "start 2" in log and text("run/done") == "60"
    marker = markers.read(job.marker)
    assert marker["state"] == "done" and marker["slurm"]["restart"] == 1
    assert marker["wall_s"] > 6  # of both starts
    assert "runs on n" in (out := capsys.readouterr().out) and "start 2)" in out


def learning(argv, out, *options, **more):
    """A real training of ESPnet's."""
    return Job(
        f"train {out}", ("python3", "-m", "espnet_pl.bridge.train", *argv, *options),
        Path(f"{out}/train.log"), outputs=(Path(f"{out}/config.yaml"),), **more,
    )  # fmt: skip


def test_a_model_is_the_same_where_its_job_was_requeued(cluster, arguments, tmp_path):
    how = dict(max_epoch=30, method_conf={"capacity": 2, "unlabelled": 2, "replace": 0.5})
    whole = learning(arguments("slimipl", "whole", **how), "whole")
    argv = arguments("slimipl", "parts", **how)
    parts = learning(argv, "parts", "--resume", "true", resumes=Path("parts/checkpoint.pth"))

    done = meanwhile(  # as the cluster tells it before a preemption or the time limit
        lambda: when(lambda: "2epoch:train:2-2batch" in text(parts.log), 120),
        lambda: command("scancel", "--batch", "--signal=USR2", number(parts)),
    )
    assert run(whole, parts) == ["train whole", "train parts"]
    done()
    assert markers.read(parts.marker)["slurm"]["restart"] == 1
    assert text(parts.log).count("going on from") == 1
    found = [torch.load(tmp_path / out / "checkpoint.pth") for out in ("whole", "parts")]
    for name in ("model", "optimizers", "schedulers", "epoch", "step"):
        assert same(found[0][name], found[1][name]), name
    averages = [torch.load(tmp_path / out / "valid.loss.ave.pth") for out in ("whole", "parts")]
    assert same(*averages)


def test_a_model_is_trained_by_two_ranks_on_each_of_two_nodes(cluster, arguments, tmp_path):
    argv = arguments("mpl", "four", max_epoch=1, batch_bins=80000)
    argv = [word.replace("/dev/", "/labelled/") for word in argv]  # dev has less than four
    options = ["--multiprocessing_distributed", "false", "--dist_launcher", "slurm"]
    options += ["--dist_init_method", f"file://{tmp_path}/meet"]
    assert run(learning(argv, "four", *options, nodes=2, tasks=2)) == ["train four"]
    found = torch.load(tmp_path / "four/checkpoint.pth")
    assert len(found["ranks"]) == 4 and found["optimizers"][0]["method"]["step"] == 5
    assert all(v.isfinite().all() for v in found["model"].values() if v.is_floating_point())


def test_what_cannot_save_is_not_disturbed_by_the_notice(cluster):
    job = shell("infer a", "trap 'exit 9' TERM USR2; touch up; sleep 3; echo whole > out")
    done = meanwhile(
        lambda: when(lambda: Path("up").exists()),
        lambda: command("scancel", "--batch", "--signal=USR2", number(job)),
    )
    assert run(job) == ["infer a"]
    done()
    assert text("out") == "whole\n" and "it goes on to the end" in text(job.log)


def test_a_cancelled_job_is_told_and_does_not_come_back(cluster):
    job = training(600)
    done = meanwhile(
        lambda: when(lambda: "from 0" in text(job.log)),
        lambda: time.sleep(1),
        lambda: command("scancel", number(job)),
    )
    with pytest.raises(LaunchError, match=r"cancelled. The same command continues it \(Slurm job"):
        run(job)
    done()
    id = markers.read(job.marker)["slurm"]["job"]
    assert state(id) == "CANCELLED" and job.why() == ["it failed before"]
    log = text(job.log)
    assert "saved" in log and "start 2" not in log
    assert "Restarts=0" in command("scontrol", "show", "job", id)


def test_a_job_moves_off_a_node_that_fails(cluster):
    job = training(80)

    def fail():
        when(lambda: "from 0" in text(job.log))
        time.sleep(1)
        node = markers.read(job.marker)["slurm"]["node"]
        command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    done = meanwhile(fail)
    assert run(job) == ["train run"]
    done()
    assert text("run/done") == "80" and "start 2" in text(job.log)
    assert markers.read(job.marker)["slurm"]["restart"] == 1


def test_a_preempted_job_comes_back(cluster):
    """By the cluster itself, which takes a lower partition's node for a higher one's job."""
    job = training(200)

    def preempt():
        when(lambda: "from 0" in text(job.log))
        node = markers.read(job.marker)["slurm"]["node"]
        command("sbatch", "-p", "gpu", "--exclusive", "-w", node, "--wrap", "sleep 1")

    done = meanwhile(preempt)
    assert run(job, opts="-p low --exclusive") == ["train run"]
    done()
    assert markers.read(job.marker)["slurm"]["restart"] == 1 and text("run/done") == "200"


def test_time_limits(cluster):
    """One that can save goes on in another turn; one that cannot fails, and it is told why."""
    driver, folder = cluster
    out, _ = driver.communicate(timeout=140)
    os.chdir(folder)
    saves, whole = limited()
    assert driver.returncode == 1 and "infer_whole.log" in out
    assert re.search(r"infer whole failed .*: time limit; more time: --slurm_opts '--time", out)
    assert text("run/done") == "1000" and markers.read(saves.marker)["slurm"]["restart"] == 1
    assert "start 2" in text(saves.log) and "start 2" not in text(whole.log)
    assert whole.why() == ["it failed before"] and saves.why() == []


def test_stopping_the_driver_leaves_the_job_and_the_same_command_finds_it(cluster, capsys):
    job = shell(
        "train left", "touch up; while ! test -e end; do sleep 0.1; done", outputs=(Path("up"),)
    )

    def stop():
        when(lambda: Path("up").exists())
        os.kill(os.getpid(), signal.SIGINT)

    done = meanwhile(stop)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    done()
    id, out = number(job), capsys.readouterr().out
    assert state(id) == "RUNNING"
    assert f"scancel {id}" in out and "tail -f log/train_left.log" in out
    with pytest.raises(
        LaunchError, match=rf"train left is Slurm job {id} \(RUNNING\): scancel {id}"
    ):
        launch.run([job])  # on this machine
    with pytest.raises(LaunchError, match=f"scancel {id}, and wait"):
        run(job, force={"train left"})
    other = shell("train left", "touch up; true", outputs=(Path("up"),))
    with pytest.raises(LaunchError, match=f"Slurm job {id} is of another configuration"):
        run(other)
    done = meanwhile(lambda: time.sleep(2), lambda: Path("end").touch())
    assert run(job) == ["train left"]
    done()
    assert f"train left: found Slurm job {id} (RUNNING)" in capsys.readouterr().out
    known = command("squeue", "--noheader", "--states=all", "--name=train_left", "--format=%i")
    assert known.split() == [id]
    assert run(job) == []


def test_a_job_that_ended_without_a_driver_is_done(cluster):
    job = shell("a", "sleep 3; touch out", outputs=(Path("out"),))

    def stop():
        when(lambda: Path("log/a.slurm").exists() and [*Path("log/a.slurm").glob("*/id")])
        os.kill(os.getpid(), signal.SIGTERM)

    done = meanwhile(stop)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    done()
    when(lambda: markers.read(job.marker)["state"] == "done")
    assert run(job) == [] and launch.run([job]) == []


def test_a_job_that_slurm_has_forgotten_is_submitted_again(cluster):
    job = shell("a", "touch out", outputs=(Path("out"),))
    submitted(job, job="999999")
    assert run(job) == ["a"]
    assert markers.read(job.marker)["slurm"]["job"] != "999999" and Path("out").exists()


def test_jobs_have_the_environment_of_the_recipe(cluster, monkeypatch):
    """A clean one but for path.sh and what local/data.sh knows."""
    Path("an4/pl1").mkdir(parents=True)
    monkeypatch.chdir("an4/pl1")
    make_folder()
    for name in ("local_data_opts", "ESPNET_PL_SHARED", "AN4_URL", "other"):
        monkeypatch.setenv(name, f"it's {name}")
    Path("path.sh").write_text("export from_path=here\n")
    job = Job("a", ("sh", "-c", 'env > out; python3 -c "import espnet_pl"'), Path("log/a.log"))
    assert run(job) == ["a"]
    seen = dict(line.split("=", 1) for line in text("out").splitlines() if "=" in line)
    assert seen["from_path"] == "here" and seen["local_data_opts"] == "it's local_data_opts"
    assert seen["ESPNET_PL_SHARED"] == "it's ESPNET_PL_SHARED"
    assert seen["AN4_URL"] == "it's AN4_URL" and "other" not in seen
    assert seen["OMP_NUM_THREADS"] == "1"


def test_a_driver_may_run_in_a_job(cluster):
    """On a login node that allows no long processes; Slurm's variables are not handed down."""
    code = "from test.recipe import slurm_jobs as t; t.run(t.shell('a', 'env > out', cpus=2))"
    script = f'PYTHONPATH={ROOT} {sys.executable} -c "{code}"'
    command("sbatch", "--export=ALL", "--mem-per-cpu=50", "--output=driver", "--wrap", script)
    seen = when(lambda: "done in" in text("driver") and text("out"))
    assert "SLURM_CPUS_PER_TASK=2\n" in seen and "SLURM_MEM_PER_CPU=50\n" not in seen


def test_a_printed_script_can_be_submitted(cluster, capsys, monkeypatch):
    monkeypatch.setenv("local_data_opts", "--seed '1 2'")
    Path("path.sh").write_text("export from_path=here\n")
    script = 'echo "$from_path $local_data_opts $x" > out'
    run(shell("train a", script, env={"x": "it's"}, resumes=Path("c.pth")), dry_run=True)
    capsys_out = capsys.readouterr().out
    assert "Submitted batch job" in command("bash", "-c", capsys_out)
    assert when(lambda: text("out")) == "here --seed '1 2' it's\n"
