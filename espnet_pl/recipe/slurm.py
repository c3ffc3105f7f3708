"""Jobs in Slurm, submitted with submitit and waited for.

The queue keeps a job when this driver ends, and the marker knows its number: the same call finds it
again.  Nothing here needs Slurm's accounting.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from espnet_pl.recipe import local, markers, progress, slurm_job, task
from espnet_pl.recipe.job import Job, LaunchError
from espnet_pl.recipe.slurm_conf import Conf, exports

GRACE = 5.0  # seconds a final state must last: for a requeue, and for files to appear
MISSED = 3  # looks in which nobody knows a job before it is taken as lost
# Why a job is still in the queue, where it is nothing to worry about.
USUAL = ("None", "Priority", "Resources", "BeginTime", "Cleaning", "(null)", "")
WHY = {
    "TIMEOUT": "time limit; more time: --slurm_opts '--time ...' or {conf}",
    "OUT_OF_MEMORY": "out of memory; more: --slurm_opts '--mem-per-cpu ...' or {conf}",
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure (it did not boot)",
    "CANCELLED": "cancelled",
    "PREEMPTED": "preempted, and not put back into the queue",
    "DEADLINE": "Slurm's deadline for it",
    "REVOKED": "revoked",
    "VANISHED": "Slurm has forgotten it, and it left no result",
}
FINAL = ("COMPLETED", "FAILED", *WHY)


class Site(Conf):
    """How jobs are submitted here."""

    def refuse_without_slurm(self) -> None:
        """Refuses a machine that cannot submit."""
        lost = [name for name in (self.command[0], "squeue") if not shutil.which(name)]
        if lost:
            raise LaunchError(
                f"--cmd slurm: no {' and no '.join(lost)} here; go to a machine that submits to "
                "Slurm, or use --cmd local"
            )

    def devices(self, wanted: int) -> list[str]:
        """As many as anybody wants: jobs wait for them in Slurm's queue, not here."""
        return [""] * (wanted * 1000)

    def start(
        self, job: Job, devices: Sequence[str], forced: bool, times: progress.Times,
        show: progress.Display,
    ):  # fmt: skip
        """A job under way; what is too small for a queue runs here."""
        if job.here:
            return local.Task(job, devices, forced, times, show)
        return Task(self, job, devices, forced, times, show)


class Watcher(SlurmInfoWatcher):
    """What Slurm says of all jobs of this driver, in one question at a time.

    squeue knows a job for some minutes after its end (MinJobAge), and needs no accounting; sacct is
    asked for what squeue has forgotten.  Where both do not know it, it is lost.
    """

    def __init__(self, delay_s: int = 20):
        super().__init__(delay_s)
        self.missed: dict[str, int] = {}
        self.silence = ""  # why Slurm does not answer

    def update(self) -> None:
        """Asks; keeps what is known where there is no answer."""
        self._last_status_check, self._num_calls = time.time(), self._num_calls + 1
        wanted = self._registered - self._finished
        if not wanted:
            return
        found = slurm_job.ask("squeue", "--me", "--states=all", "--format=%i|%T|%N|%r")
        self.silence = (found.stderr.strip() or "it fails") if found.returncode else ""
        if self.silence:
            return
        for line in found.stdout.splitlines()[1:]:
            number, state, nodes, reason = line.strip().split("|", 3)
            if number in wanted:
                self._info_dict[number] = {"State": state, "NodeList": nodes, "Reason": reason}
                self.missed.pop(number, None)
                wanted.discard(number)
        if not wanted:
            return
        found = slurm_job.ask(
            "sacct", "--parsable2", "--format=JobID,State,NodeList", "--jobs", ",".join(wanted)
        )
        known = self.read_info(found.stdout) if found.returncode == 0 else {}
        for number in wanted:
            if number in known:
                state = known[number]["State"].split()[0]  # "CANCELLED by 1000"
                self._info_dict[number] = {**known[number], "State": state}
                continue
            self.missed[number] = self.missed.get(number, 0) + 1
            if self.missed[number] >= MISSED:
                self._info_dict[number] = {"State": "VANISHED"}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """By the final states: submitit counts those it does not know as final."""
        return self.get_state(job_id, mode) in FINAL


class Watched(SlurmJob):
    """submitit's job, looked at without accounting."""

    watcher = Watcher()


class Executor(SlurmExecutor):
    """submitit's executor, with the site's command line; one process in the batch script."""

    job_class = Watched

    def __init__(self, folder: Path, sbatch: Sequence[str]):
        # exec: Slurm's notice goes to the batch script's own process, which bash would not pass on.
        super().__init__(folder, python=f"exec {shlex.quote(sys.executable)}")
        self.sbatch = list(sbatch)
        root = shlex.quote(str(Path(__file__).parents[2]))
        setup = [
            "trap '' USR2",  # until Python is there to hear it
            *exports({}),
            "[ ! -e path.sh ] || . ./path.sh || exit 1",
            f'export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        ]
        # Nothing of submitit's own defaults: the site decides.
        self.update_parameters(
            setup=setup, use_srun=False, stderr_to_stdout=True, time=None, wckey=None
        )

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return [*self.sbatch, str(submission_file_path)]


class Task:
    """A job in Slurm, like `local.Task`; one that an earlier call left there is taken up again.

    Args:
        site: how to submit.
        job: what to run.
        devices: what `Site.devices` gave; Slurm names the real ones.
        forced: an earlier run's folder is moved aside instead of continued.
        times: how long similar jobs took.
        show: where the user is told.
    """

    survives = True  # when the driver is stopped

    def __init__(
        self, site: Site, job: Job, devices: Sequence[str], forced: bool, times: progress.Times,
        show: progress.Display,
    ):  # fmt: skip
        task.refuse_without_inputs(job)
        self.site, self.job, self.devices, self.show = site, job, list(devices), show
        self.final: Mapping | None = None  # the marker of its end
        self.next, self.gone = 0.0, 0.0  # the next look; since when Slurm says that it has ended
        self.start, self.queued, self.cause = -1, False, ""  # what the user was told last
        before = markers.read(job.marker) or {}
        if alive := _alive(before):
            self._attach(before, forced, *alive)
        else:
            self._submit(before, forced, times)
        self.watch = progress.Epochs(job, job.log.stat().st_size, show)

    def _attach(self, before: Mapping, forced: bool, number: str, state: str) -> None:
        if forced:
            raise LaunchError(f"{self.job.name} is Slurm job {number}: scancel {number}, and wait")
        changed = markers.changes(before.get("fingerprint"), markers.fingerprint(self.job))
        if changed:
            raise LaunchError(
                f"{self.job.name}: Slurm job {number} is of another configuration:\n"
                + "".join(f"    {change}\n" for change in changed[:10])
                + f"Undo the change, or: scancel {number}"
            )
        self.folder = before["slurm"]["folder"]
        self.slurm = Watched(self.folder, number)
        self.job.log.touch()
        self.show.line(f"{self.job.name}: found Slurm job {number} ({state}), log {self.job.log}")

    def _submit(self, before: Mapping, forced: bool, times: progress.Times) -> None:
        job, show = self.job, self.show
        reasons, usual = job.why(), times.usual(job.name)
        sbatch = [self.site.command[0], *shlex.split(" ".join(self.site.lines(job)))]
        sink, moved = task.prepare(job, forced)
        sink.close()
        if moved:
            show.line(f"{job.name}: the earlier run is now {moved}")
            before = {}
        parent = job.log.with_suffix(".slurm")
        shutil.rmtree(parent, ignore_errors=True)  # of submissions that have ended
        # Slurm's numbers come back after years; this does not, and so no result is taken for ours.
        self.folder = str(parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}")
        record = task.record(job, before) | {"slurm": {"folder": self.folder}}
        markers.write(job.marker, record | {"state": markers.SUBMITTED})
        try:
            with _outside():
                executor = Executor(Path(self.folder), sbatch)
                self.slurm = executor.submit(slurm_job.Command(job, self.folder))
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            markers.write(job.marker, record | {"state": "could not be submitted"})
            raise LaunchError(
                f"{job.name}: not submitted: {str(error).strip()}\nThe command was: "
                f"{shlex.join(sbatch)}, by {self.site.conf}"
            ) from None
        _number(self.folder).write_text(self.slurm.job_id)
        again = f" ({'; '.join(reasons[:3])})" if before and reasons else ""
        took = f", similar jobs took {progress.duration(usual)}" if usual else ""
        show.line(f"{job.name}: Slurm job {self.slurm.job_id}, log {job.log}{took}{again}")

    def poll(self) -> bool:
        """Whether it has ended; shows what is new in its log, and of its state."""
        if self.final is not None:
            return True
        if time.monotonic() < self.next:
            return False
        self.next = time.monotonic() + 1.0
        self.watch.look()
        found = markers.read(self.job.marker)
        own = (found or {}).get("slurm") or {}
        if found is not None and own.get("folder") != self.folder:
            self.final = {"reason": "another call has submitted it again", "theirs": True}
        elif found is not None and found.get("state") in ("done", "failed"):
            self.final = found
        else:
            self._look(found or {}, own)
        if self.final is not None:
            self.watch.look()
        return self.final is not None

    def _look(self, found: Mapping, own: Mapping) -> None:
        """Asks Slurm, tells what has changed, and notes an end that the job could not note."""
        number = self.slurm.job_id
        info = self.slurm.get_info(mode="standard")
        state = info.get("State", "UNKNOWN")
        if state in FINAL:
            self.gone = self.gone or time.monotonic()
            if time.monotonic() - self.gone < GRACE:
                return
            info = self.slurm.get_info(mode="force")
            if info.get("State") not in FINAL:
                return
            why = WHY.get(
                info["State"], f"Slurm says {info['State']}, and it left no result"
            ).format(conf=self.site.conf)
            again = self.job.resumes and self.job.resumes.exists()
            why += ". The same command continues it" if again else ""
            self.final = {**found, "state": "failed", "reason": why}
            markers.write(self.job.marker, self.final)
            return
        self.gone = 0.0
        if own.get("restart", -1) > self.start:
            self.start, self.queued = own["restart"], False
            start = f", start {self.start + 1}" if self.start else ""
            self.show.line(f"{self.job.name}: runs on {own['node']} (Slurm job {number}{start})")
        elif state == "PENDING" and self.start >= 0 and not self.queued:
            self.queued = True
            self.show.line(f"{self.job.name}: back in the queue (Slurm job {number})")
        cause = info.get("Reason", "") if state == "PENDING" else ""
        if silence := self.slurm.watcher.silence:
            cause = f"squeue does not answer: {silence}"
        if cause not in (*USUAL, self.cause):
            self.show.line(f"{self.job.name}: waits: {cause} (Slurm job {number})")
            self.cause = cause

    def finish(self) -> None:
        """Tells how it ended; raises `LaunchError` with the end of the log if it failed."""
        wall, cpu = self.final.get("wall_s") or 0.0, self.final.get("cpu_s") or 0.0
        spent = f"{progress.duration(wall)} ({progress.duration(cpu)} CPU)"
        number = self.slurm.job_id
        if self.final.get("state") == "done":
            task.appear(self.job.outputs)
            self.show.line(f"{self.job.name}: done in {spent}, Slurm job {number}")
            shutil.rmtree(self.job.log.with_suffix(".slurm"), ignore_errors=True)
            return
        raise task.failure(self.job, spent, f"{self.final['reason']} (Slurm job {number})")

    def leave(self) -> None:
        """Says how to follow or end what goes on without this driver."""
        number = self.slurm.job_id
        self.show.line(
            f"{self.job.name}: Slurm job {number} goes on; the same command finds it again\n"
            f"    follow it: tail -f {self.job.log}\n    end it:    scancel {number}"
        )


def refuse_alive(job: Job, before: Mapping) -> None:
    """Refuses to run here what Slurm has still to do.

    Args:
        before: the marker, of a job that was submitted.
    """
    if not shutil.which("squeue"):
        raise LaunchError(
            f"{job.name} was submitted to Slurm, and there is no squeue here to ask whether it "
            f"still runs. Go where there is one; or, if you know that it has ended, rm {job.marker}"
        )
    if alive := _alive(before):
        number, state = alive
        raise LaunchError(
            f"{job.name} is Slurm job {number} ({state}): scancel {number}, or --cmd slurm, which "
            "waits for it"
        )


def _alive(before: Mapping) -> tuple[str, str] | None:
    """Number and state of the Slurm job of a marker, if it has not ended."""
    own = before.get("slurm") or {}
    if before.get("state") != markers.SUBMITTED or not own:
        return None
    note = _number(own["folder"])
    number = own.get("job") or (note.read_text().strip() if note.exists() else "")
    if not number:  # the driver ended before sbatch did
        return None
    watcher = Watched.watcher
    state = "UNKNOWN"
    for _ in range(MISSED):
        state = watcher.get_info(number, mode="force").get("State", state)
        if state != "UNKNOWN":
            break
        time.sleep(1)
    return None if state in FINAL else (number, state)


def _number(folder: str) -> Path:
    return Path(folder) / "id"


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Without what a job that the driver itself runs in has set, but with the cluster's address."""
    inside, conf = "SLURM_JOB_ID" in os.environ, os.environ.get("SLURM_CONF")
    with clean_env() if inside else contextlib.nullcontext():
        if conf:
            os.environ["SLURM_CONF"] = conf
        yield
