"""What runs on the compute node: a job's command, watched over.

Slurm may take a job away at any time, start it once more somewhere else, and lose sight of a copy
that still runs.  So the marker names the submission and the start of it that may write; any other
copy ends.  A job that was stopped with its state saved asks Slurm to be put back into the queue.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from espnet_pl.recipe import markers, task
from espnet_pl.recipe.job import Job, LaunchError

LOOK = 2.0  # seconds between two looks whether another copy has taken over
FENCE = 10.0  # seconds an earlier copy, which did not say that it has left, gets to see that
LOCK = 60.0  # seconds the log may be in use by one that dies
FRUITLESS = 3  # times a job is put back that had saved nothing
RUNS = ("RUNNING", "SIGNALING")  # states of a job that Slurm is not about to end


class Command:
    """A job as Slurm runs it; submitit pickles it and calls it in the batch script's process.

    Args:
        job: what to run.
        folder: of this submission, which names it in the marker.
    """

    def __init__(self, job: Job, folder: str):
        self.job, self.folder = job, folder

    def __call__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.told = ""  # the signal that asked to stop
        for sign in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(sign, self._tell)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit would note every one
        self.id = os.environ["SLURM_JOB_ID"]
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        record = self._claim()
        with self._log(record) as log:
            where = f"Slurm job {self.id} on {self.node}"
            begun = f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {where}, start {self.restart + 1}"
            log.write(f"{begun}: {self.job.shell()}\n".encode())
            log.flush()
            record["environment"] = markers.environment()
            saved = self._saved()
            code = self._run(record, log)
        self._end(record, code, saved != self._saved())

    def _claim(self) -> dict[str, Any]:
        """The record, with this copy in it as the one that may write."""
        record = markers.read(self.job.marker) or {}
        own = record.get("slurm") or {}
        if own.get("folder") != self.folder or own.get("restart", 0) > self.restart:
            self._superseded()
        task.appear(self.job.inputs)
        changed = markers.changes(record.get("fingerprint"), markers.fingerprint(self.job))
        if changed:
            self._fail(record, f"changed since it was submitted: {'; '.join(changed[:3])}")
        alone = own.pop("left", False) or self.restart == 0
        own |= {"job": self.id, "restart": self.restart, "node": self.node}
        record |= {"state": markers.SUBMITTED, "slurm": own}
        markers.write(self.job.marker, record)
        if not alone:
            time.sleep(FENCE)
        return record

    def _mine(self) -> bool:
        record = markers.read(self.job.marker)
        if record is None:  # a file system that stumbles; a week of training must not end by it
            return True
        own = record.get("slurm") or {}
        return (own.get("folder"), own.get("restart")) == (self.folder, self.restart)

    def _log(self, record: dict):
        end = time.monotonic() + LOCK
        while True:
            try:
                return task.lock(self.job)
            except LaunchError as error:
                if time.monotonic() > end:
                    if not self.restart:
                        self._fail(record, str(error))
                    # A node that was lost cannot give its lock back.
                    return open(self.job.log, "ab")
                time.sleep(1)

    def _run(self, record: dict, log) -> int:
        """Runs the command; its exit code, negative for a signal."""
        argv = task.command(self.job)
        if self._several:
            argv = [*srun(self.job), *argv]
        try:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=task.environment(self.job), start_new_session=True,
                # What reaches more than this process must not kill those that expect nothing;
                # srun passes it on.
                preexec_fn=None if self._several else _deaf,
            )  # fmt: skip
        except OSError as error:
            self._fail(record, f"cannot start {argv[0]}: {error}")
        if self.told:  # before there was one to pass it on to
            self._tell(getattr(signal, self.told))
        began, look = time.monotonic(), time.monotonic() + LOOK
        while True:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                break
            # Not a wait for the process: a signal's handler runs between two looks.
            time.sleep(0.1)
            if time.monotonic() > look:
                look = time.monotonic() + LOOK
                if not self._mine():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.process.pid, signal.SIGKILL)
                    self._superseded()
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        task.spend(record, time.monotonic() - began, usage)
        return code

    def _tell(self, sign: int, _=None) -> None:
        """Passes on that the time is up: to the process itself, not to its helpers."""
        self.told = signal.Signals(sign).name
        if self.process is None or self.process.returncode is not None:
            return
        if sign == signal.SIGUSR2 and not self.job.resumes:
            _say("its time is nearly up, and it cannot be continued: it goes on to the end")
            return
        # srun ends its step at once when it is terminated; other signals it passes on.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR2 if self._several else signal.SIGTERM)

    def _saved(self) -> int:
        """When the checkpoint was written."""
        there = self.job.resumes and self.job.resumes.exists()
        return self.job.resumes.stat().st_mtime_ns if there else 0

    @property
    def _several(self) -> bool:
        return self.job.nodes * self.job.tasks > 1

    def _end(self, record: dict, code: int, saved: bool) -> None:
        if not self._mine():
            self._superseded()
        reason = task.problem(self.job, code)
        if not reason:
            markers.write(self.job.marker, record | {"state": "done"})
            return
        if code and not self._ours(code):
            # Slurm takes the job away, and puts it back or not: no result of ours.
            _say("Slurm ends this job")
            record["slurm"]["left"] = True
            markers.write(self.job.marker, record)
            sys.exit(_status(code))
        ends = [-signal.SIGTERM, -signal.SIGUSR2]
        stopped = self.told and code in (*ends, *map(_status, ends))
        if not (stopped or (self.job.resumes and code == task.AGAIN)):
            self._fail(record, reason, code or 1)
        own = record["slurm"]
        own["fruitless"] = 0 if saved else own.get("fruitless", 0) + 1
        if own["fruitless"] > FRUITLESS:
            times = f"was stopped {own['fruitless']} times before it had saved anything"
            self._fail(record, f"{times}: it needs more time (conf/slurm.conf)", code)
        own["left"] = True
        markers.write(self.job.marker, record)
        _say(f"stopped by {self.told or 'itself'}; back into the queue")
        back = ask("scontrol", "requeue", self.id)
        if back.returncode > 0:  # else it did, perhaps so soon that it ended the one that asked
            says = back.stderr.strip()
            self._fail(record, f"stopped, and Slurm did not put it back: {says}", code)
        sys.exit(_status(code))

    def _ours(self, code: int) -> bool:
        """Whether a failure is the command's own, and not Slurm's taking the job away."""
        for _ in range(3):  # Slurm's signal reaches the child and this process in any order
            found = ask("squeue", "--noheader", "--jobs", self.id, "--format", "%T")
            if found.returncode == 0 and found.stdout.strip() not in RUNS:
                return False
            if self.told or code >= 0:
                break
            time.sleep(1)
        return found.returncode == 0 or self.told != signal.SIGTERM.name

    def _superseded(self) -> None:
        _say(f"job {self.id}, start {self.restart + 1}: another copy has taken over")
        sys.exit(0)

    def _fail(self, record: Mapping, reason: str, code: int = 1) -> None:
        _say(reason)
        markers.write(self.job.marker, {**record, "state": "failed", "reason": reason})
        sys.exit(_status(code))


def srun(job: Job) -> list[str]:
    """Starts the processes of a job, each with its SLURM_PROCID."""
    return [
        "srun", f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks}",
        f"--cpus-per-task={job.cpus}", "--export=ALL",  # output in whole lines, so not unbuffered
        "--wait=60",  # seconds the others get when one has ended: to save, not to hang
    ]  # fmt: skip


def _deaf() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def ask(*argv: str) -> subprocess.CompletedProcess:
    """What one of Slurm's programs says; without it, or an answer, that it failed."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(argv, 1, "", f"{shlex.join(argv)}: {error}")


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _say(text: str) -> None:
    print(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)  # Slurm appends it
