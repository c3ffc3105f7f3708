"""What jobs under way have in common, on this machine and in Slurm."""

import contextlib
import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from espnet_pl.parts.signals import AGAIN
from espnet_pl.recipe import markers
from espnet_pl.recipe.job import Job, LaunchError

# What a file system without locks answers.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def refuse_without_inputs(job: Job) -> None:
    """Refuses a job whose inputs are not there."""
    missing = [str(path) for path in job.inputs if not path.exists()]
    if missing:
        raise LaunchError(f"{job.name}: run the stages before it; missing {', '.join(missing)}")


def prepare(job: Job, forced: bool) -> tuple[Any, str]:
    """The folders of a job, and its log, open and locked.

    Args:
        forced: an earlier run's folder is moved aside.

    Returns:
        The log, and where an earlier run is now (empty if it stayed).
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    sink, moved = lock(job), ""
    if forced and job.resumes and job.resumes.exists():
        moved = str(_move_aside(job.resumes.parent))
        sink.close()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        sink = lock(job)
    for path in job.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    return sink, moved


def record(job: Job, before: Mapping) -> dict[str, Any]:
    """What a marker holds of a job that begins.

    Args:
        before: the marker of the run that it continues; empty if it begins anew.
    """
    found = {
        "name": job.name, "fingerprint": markers.fingerprint(job), "shell": job.shell(),
        "gpus": job.gpus, "wall_s": 0.0, "cpu_s": 0.0, "max_rss_mb": 0,
    }  # fmt: skip
    if job.resumes and before.get("state", "done") != "done":  # what it took so far
        found |= {key: before.get(key, 0.0) for key in ("wall_s", "cpu_s")}
    return found


def spend(record: dict[str, Any], wall: float, usage) -> None:
    """Adds what a process took to a record."""
    record["wall_s"] = round(record["wall_s"] + wall, 2)
    record["cpu_s"] = round(record["cpu_s"] + usage.ru_utime + usage.ru_stime, 2)
    record["max_rss_mb"] = usage.ru_maxrss // 1024
    record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")


def problem(job: Job, code: int) -> str:
    """What is wrong with a job that ended so, in words; empty if it succeeded."""
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        return reason + (" (out of memory?)" if -code == signal.SIGKILL else "")
    if code == AGAIN and job.resumes:
        return "it was stopped, and has saved its state; the same command continues it"
    lost = [str(path) for path in job.outputs if not path.exists()]
    return f"exit code {code}" if code else f"did not write {', '.join(lost)}" if lost else ""


def failure(job: Job, after: str, reason: str) -> LaunchError:
    """The error that tells what happened, where, and how to repeat it."""
    lines = []
    if job.log.exists():
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    path = ". ./path.sh && " if Path("path.sh").exists() else ""
    return LaunchError(
        f"{job.name} failed after {after}: {reason}. The end of {job.log}:\n"
        + "".join(f"    {line}\n" for line in lines)
        + f"To repeat this step alone:\n    {path}{job.shell()}"
    )


def command(job: Job) -> list[str]:
    """The command, with the interpreter that runs this."""
    return [sys.executable if job.argv[0] == "python3" else job.argv[0], *job.argv[1:]]


def environment(job: Job, devices: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a job's process.

    Args:
        devices: names of the GPUs it may use; none where it is not for us to say.
    """
    # One thread each: jobs run side by side, and more threads than cores make torch crawl.
    env = {"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"} | os.environ | dict(job.env)
    root = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    # Scripts find the python that runs this, as they do after path.sh.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"  # the end of a log must not be lost with the process
    if any(devices):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return env


def appear(paths: Iterable[Path], seconds: float = 60.0) -> None:
    """Waits, not for ever, for files of another machine, which a network shows late."""
    end = time.monotonic() + seconds
    for path in paths:
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                os.listdir(path.parent)  # what is known of the folder is looked up anew


def lock(job: Job):
    """The open log, locked until the last process that writes to it has ended, driver or child.

    A lock reaches as far as the file system carries it, often no further than this machine; what
    runs in Slurm is known by the marker, too.
    """
    sink = open(job.log, "ab")
    try:
        fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sink.close()
        raise LaunchError(f"{job.name} is already running (its log {job.log} is in use)") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return sink


def _move_aside(folder: Path) -> Path:
    name, number = f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}", 1
    target = folder.with_name(name)
    while target.exists():  # another one went aside in the same second
        number += 1
        target = folder.with_name(f"{name}-{number}")
    folder.rename(target)
    return target
