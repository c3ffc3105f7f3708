"""Jobs as processes of this machine."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence

from espnet_pl.recipe import markers, progress, task
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

    survives = False  # when the driver is stopped

    def __init__(
        self,
        job: Job,
        devices: Sequence[str],
        forced: bool,
        times: progress.Times,
        show: progress.Display,
    ):
        task.refuse_without_inputs(job)
        if job.nodes > 1 or job.tasks > 1:
            raise LaunchError(f"{job.name}: {job.nodes} nodes x {job.tasks} tasks: --cmd slurm")
        self.job, self.devices, self.show = job, list(devices), show
        self.code: int | None = None
        reasons, before, usual = job.why(), markers.read(job.marker) or {}, times.usual(job.name)
        if before.get("state") == markers.SUBMITTED:
            from espnet_pl.recipe import slurm  # only here: it takes time to import

            slurm.refuse_alive(job, before)
        sink, moved = task.prepare(job, forced)
        if moved:
            show.line(f"{job.name}: the earlier run is now {moved}")
            before = {}
        self.record = task.record(job, before) | {
            "state": "was interrupted",
            "environment": markers.environment(),
        }
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
        task.spend(self.record, self.wall, usage)
        return True

    def finish(self) -> None:
        """Writes the marker; raises `LaunchError` with the end of the log if it failed."""
        reason = task.problem(self.job, self.code)
        markers.write(self.job.marker, {**self.record, "state": "failed" if reason else "done"})
        spent = f"{progress.duration(self.wall)} ({progress.duration(self.cpu)} CPU)"
        if reason:
            raise task.failure(self.job, spent, reason)
        if not self.job.here:
            self.show.line(f"{self.job.name}: done in {spent}")

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
    env = task.environment(job, devices)
    try:
        return subprocess.Popen(
            task.command(job), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise LaunchError(f"{job.name}: cannot start {job.argv[0]}: {error}") from error
