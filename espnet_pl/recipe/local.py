"""Jobs as processes of this machine."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from espnet_pl.recipe import markers, progress
from espnet_pl.recipe.job import Job, LaunchError


class Task:
    """A job under way: its process, log, devices and clock.

    Args:
        job: what to run.
        devices: names of the GPUs it may use.
        forced: an earlier run's folder is moved aside instead of continued.
        times: how long similar jobs took.
        show: where the user is told.
    """

    def __init__(
        self,
        job: Job,
        devices: Sequence[str],
        forced: bool,
        times: progress.Times,
        show: progress.Display,
    ):
        missing = [str(path) for path in job.inputs if not path.exists()]
        if missing:
            raise LaunchError(f"{job.name}: run the stages before it; missing {', '.join(missing)}")
        self.job, self.devices, self.show = job, list(devices), show
        self.code: int | None = None
        reasons, before, usual = job.why(), markers.read(job.marker) or {}, times.usual(job.name)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        sink = _lock(job)
        if forced and job.resumes and job.resumes.exists():
            show.line(f"{job.name}: the earlier run is now {_move_aside(job.resumes.parent)}")
            sink.close()
            job.log.parent.mkdir(parents=True, exist_ok=True)
            sink, before = _lock(job), {}
        self.record = {
            "state": "was interrupted", "name": job.name, "fingerprint": markers.fingerprint(job),
            "shell": job.shell(), "environment": markers.environment(), "gpus": job.gpus,
            "wall_s": 0.0, "cpu_s": 0.0, "max_rss_mb": 0,
        }  # fmt: skip
        if job.resumes and before.get("state", "done") != "done":  # what it took so far
            self.record |= {key: before.get(key, 0.0) for key in ("wall_s", "cpu_s")}
        for path in job.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
        markers.write(job.marker, self.record)
        again = f" ({'; '.join(reasons[:3])})" if before and reasons else ""
        took = f", similar jobs took {progress.duration(usual)}" if usual else ""
        if not job.here:  # too short to be worth two lines
            show.line(f"{job.name}: started, log {job.log}{took}{again}")
        with sink:
            sink.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {job.shell()}\n".encode())
            sink.flush()
            self.watch = progress.Epochs(job, sink.tell(), show)
            self.process = _start(job, sink, devices)
        self.began = time.monotonic()

    def poll(self) -> bool:
        """Whether it has ended; shows what is new in its log."""
        if self.code is not None:
            return True
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        self.watch.look()
        if not pid:
            return False
        # Told to Popen too, which would otherwise wait for a process that is gone.
        self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
        self.wall, self.cpu = time.monotonic() - self.began, usage.ru_utime + usage.ru_stime
        self.record["wall_s"] = round(self.record["wall_s"] + self.wall, 2)
        self.record["cpu_s"] = round(self.record["cpu_s"] + self.cpu, 2)
        self.record["max_rss_mb"] = usage.ru_maxrss // 1024
        self.record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
        return True

    def finish(self) -> None:
        """Writes the marker; raises `LaunchError` with the end of the log if it failed."""
        job = self.job
        lost = [str(path) for path in job.outputs if not path.exists()]
        good = self.code == 0 and not lost
        markers.write(job.marker, {**self.record, "state": "done" if good else "failed"})
        spent = f"{progress.duration(self.wall)} ({progress.duration(self.cpu)} CPU)"
        if good:
            if not job.here:
                self.show.line(f"{job.name}: done in {spent}")
            return
        if self.code < 0:
            reason = f"killed by {signal.Signals(-self.code).name}"
            reason += " (out of memory?)" if -self.code == signal.SIGKILL else ""
        else:
            reason = f"exit code {self.code}" if self.code else f"did not write {', '.join(lost)}"
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        path = ". ./path.sh && " if Path("path.sh").exists() else ""
        raise LaunchError(
            f"{job.name} failed after {spent}: {reason}. The end of {job.log}:\n"
            + "".join(f"    {line}\n" for line in lines)
            + f"To repeat this step alone:\n    {path}{job.shell()}"
        )

    def stopped(self) -> None:
        """Writes down that it was stopped on purpose, once it has ended."""
        self.kill(signal.SIGKILL)  # helpers that outlived it
        markers.write(self.job.marker, {**self.record, "state": "was stopped"})

    def kill(self, sign: int) -> None:
        """Sends a signal to the process and all it has started."""
        try:
            os.killpg(self.process.pid, sign)
        except (ProcessLookupError, PermissionError):
            pass


def devices(wanted: int) -> list[str]:
    """The GPUs of this machine for jobs that want up to so many each.

    Where it cannot be asked, one without a name: jobs then run on it one at a time.
    """
    if not wanted:
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        found = [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    else:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
            found = [str(n) for n, line in enumerate(listed.splitlines()) if line.startswith("GPU")]
        except OSError:
            found = [""]
    if len(found) < wanted:
        raise LaunchError(f"--ngpu {wanted}, but this machine shows {len(found)} GPUs")
    return found


def _start(job: Job, log, devices: Sequence[str]) -> subprocess.Popen:
    """The process, in a group of its own so that it can be stopped as a whole."""
    # One thread each: jobs run side by side, and more threads than cores make torch crawl.
    env = {"OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"} | os.environ | dict(job.env)
    root = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    # Scripts find the python that runs this, as they do after path.sh.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"  # the end of a log must not be lost with the process
    if any(devices):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    argv = [sys.executable if job.argv[0] == "python3" else job.argv[0], *job.argv[1:]]
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
        )
    except OSError as error:
        raise LaunchError(f"{job.name}: cannot start {job.argv[0]}: {error}") from error


def _lock(job: Job):
    """The open log, locked until the last process that writes to it has ended, driver or child."""
    sink = open(job.log, "ab")
    try:
        fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sink.close()
        raise LaunchError(f"{job.name} is already running (its log {job.log} is in use)") from None
    return sink


def _move_aside(folder: Path) -> Path:
    name, number = f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}", 1
    target = folder.with_name(name)
    while target.exists():  # another one went aside in the same second
        number += 1
        target = folder.with_name(f"{name}-{number}")
    folder.rename(target)
    return target
