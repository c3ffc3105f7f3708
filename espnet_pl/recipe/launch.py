"""Runs jobs where they belong, in the order their files demand, and never twice without a reason.

A job waits for the jobs that write its inputs.  It is skipped while its marker says that it
succeeded with the same command and the same content of its inputs (`markers`).
"""

import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from espnet_pl.recipe import local, markers, progress
from espnet_pl.recipe.job import Job, LaunchError

__all__ = ["Job", "LaunchError", "backend", "run"]

POLL = 0.05  # seconds between two looks at the children
GRACE = 60.0  # seconds a child may take to save its state when stopped


class Backend(NamedTuple):
    """Where jobs run.

    Args:
        start: gives a job under way, like `local.Task`.
        devices: the GPUs there are for jobs that want up to so many each.
        text: what a user would type.
    """

    start: Callable
    devices: Callable[[int], list[str]]
    text: Callable[[Job], str]


def backend(cmd: str, opts: str = "", dry_run: bool = False) -> Backend:
    """Where jobs run.

    Args:
        cmd: ``local``, on this machine, or ``slurm``.
        opts: more options of sbatch.
        dry_run: whether it is enough that commands can be printed.
    """
    if cmd == "local":
        return Backend(local.Task, local.devices, Job.shell)
    if cmd == "slurm":
        try:
            from espnet_pl.recipe import slurm
        except ModuleNotFoundError as error:
            raise LaunchError(f"--cmd slurm: no {error.name}; run tools/install.sh") from None
        site = slurm.Site(opts)
        if not dry_run:
            site.refuse_without_slurm()
        return Backend(site.start, site.devices, site.script)
    raise LaunchError(f"--cmd {cmd}: known are local and slurm (cmd_backend in cmd.sh)")


def run(
    jobs: Sequence[Job],
    cmd: str = "local",
    nj: int = 1,
    dry_run: bool = False,
    force: Collection[str] = (),
    history: Iterable[Path] = (),
    opts: str = "",
    keep_going: bool = False,
) -> list[str]:
    """Runs what is not up to date, up to ``nj`` jobs at a time; returns the names of what ran.

    Args:
        jobs: each after those that write its inputs.
        cmd: where, ``local`` or ``slurm``.
        dry_run: only print the commands.
        force: names of jobs to run although they are up to date.
        history: folders with markers of earlier jobs, to say how long similar ones took.
        opts: more options of sbatch.
        keep_going: after a failure, run all jobs that do not wait for the one that failed.

    Raises:
        LaunchError: a job could not run or failed; jobs that were running meanwhile have ended.
        KeyboardInterrupt: stopped by a signal; the children have ended, but for those in Slurm.
    """
    there = backend(cmd, opts, dry_run)
    if dry_run:
        for job in jobs:
            print(f"# {job.name} -> {job.log}\n{there.text(job)}")
        return []
    needs = _needs(jobs)
    _refuse_foreign_checkpoints(jobs, needs, force)
    devices = there.devices(max((job.gpus for job in jobs), default=0))
    times, show = progress.Times(history), progress.Display()
    todo, running, done, ran, current = list(jobs), [], set(), [], []
    due = set(force)  # to be run, known since what they wait for was there: asking reads files
    failures: dict[str, LaunchError] = {}
    lost: set[str] = set()  # failed, or waits for what did
    with _Signals() as signals:
        while todo or running:
            before = len(todo) + len(running)
            for job in list(todo):
                if (failures and not keep_going) or signals.count or not needs[job.name] <= done:
                    continue
                if job.name not in due and not job.why():
                    todo.remove(job)
                    done.add(job.name)
                    current.append(job.name)
                    continue
                due.add(job.name)
                if len(running) < max(nj, 1) and len(devices) >= job.gpus:
                    todo.remove(job)
                    own, devices[: job.gpus] = devices[: job.gpus], []
                    try:
                        running.append(there.start(job, own, job.name in force, times, show))
                        ran.append(job.name)
                    except LaunchError as error:
                        failures[job.name] = error
                        devices.extend(own)
            if signals.count:
                _stop(running, signals, show)
                raise KeyboardInterrupt
            for child in [child for child in running if child.poll()]:
                running.remove(child)
                devices.extend(child.devices)
                try:
                    child.finish()
                    done.add(child.job.name)
                except LaunchError as error:
                    failures[child.job.name] = error
                    if keep_going:
                        show.line(f"FAILED: {child.job.name}; the others go on")
            if failures and keep_going:
                lost |= {*failures}
                for job in [job for job in todo if needs[job.name] & lost]:
                    todo.remove(job)
                    lost.add(job.name)
            elif failures and (todo or running):
                if running and todo:
                    show.line(f"FAILED; waiting for {', '.join(c.job.name for c in running)}")
                todo.clear()
            show.status(len(running), len(todo))
            if running:
                time.sleep(POLL)
            elif todo and len(todo) == before:
                raise LaunchError(f"{todo[0].name} waits for a job that waits for it")
    if current:
        show.line(f"up to date: {_named(current)}")
    if failures:
        if waiting := [job.name for job in jobs if job.name in lost - {*failures}]:
            show.line(f"not run, as they wait for what failed: {_named(waiting)}")
        raise LaunchError("\n".join(map(str, failures.values())))
    return ran


def _named(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} jobs"


def _stop(running: Sequence, signals: "_Signals", show: progress.Display) -> None:
    """Ends the children, with time to save their state, and writes down that they were stopped.

    What Slurm has in its queue stays there.
    """
    for child in [child for child in running if child.survives]:
        child.leave()
    running = [child for child in running if not child.survives]
    if running:
        show.line(f"stopping {', '.join(child.job.name for child in running)} ...")
    for child in running:
        child.kill(signal.SIGTERM)
    end, left = time.monotonic() + GRACE, list(running)
    while left := [child for child in left if not child.poll()]:
        if signals.count > 1 or time.monotonic() > end:  # a second Ctrl-C, or out of patience
            for child in left:
                child.kill(signal.SIGKILL)
        time.sleep(POLL)
    for child in running:
        child.stopped()


class _Signals:
    """Counts Ctrl-C, SIGTERM and SIGHUP, so that no job is lost between two lines of `run`."""

    def __init__(self):
        self.count, self.before = 0, {}

    def _note(self, *_) -> None:
        self.count += 1

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self.before[sign] = signal.signal(sign, self._note)
        return self

    def __exit__(self, *_) -> None:
        for sign, handler in self.before.items():
            signal.signal(sign, handler)


def _needs(jobs: Sequence[Job]) -> dict[str, set[str]]:
    """Which jobs each job waits for: those that write its inputs."""
    writer = {path: job.name for job in jobs for path in job.outputs}
    assert len({job.name for job in jobs}) == len(jobs), "two jobs of the same name"
    return {job.name: {writer[p] for p in job.inputs if p in writer} for job in jobs}


def _refuse_foreign_checkpoints(
    jobs: Sequence[Job], needs: Mapping[str, set[str]], force: Collection[str]
) -> None:
    """Found before anything runs: a training must not go on from another configuration's state."""
    again: set[str] = set()  # trainings that will run, and what depends on them
    for job in jobs:
        upstream = sorted(needs[job.name] & again)
        if upstream or (job.resumes and (job.name in force or job.why())):
            again.add(job.name)
        if not job.resumes or not job.resumes.exists() or job.name in force:
            continue
        old = (markers.read(job.marker) or {}).get("fingerprint")
        found = markers.changes(old, markers.fingerprint(job))
        found = found or [f"{name} will run again" for name in upstream]
        if found:
            raise LaunchError(
                f"{job.name}: {job.resumes.parent} holds a run of another configuration:\n"
                + "".join(f"    {change}\n" for change in found[:10])
                + "Undo the change, give the run another name, or add --force: it moves the old "
                f"folder to {job.resumes.parent}.old-<time> and starts anew."
            )
