"""One command of a recipe, and whether it has to run."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from espnet_pl.recipe import markers


class LaunchError(Exception):
    """A job cannot run or did not succeed; the message says why and what to do."""


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        name: unique; shown to the user, its first words say which jobs take similar time.
        argv: the command; ``python3`` is replaced by the running interpreter.
        log: the file that receives all output; the marker lies beside it.
        gpus: how many it needs, on each node.
        cpus: how many each of its processes needs.
        nodes: how many machines it needs; more than one, or several ``tasks``, only in Slurm.
        tasks: processes on each node, all of the same command; SLURM_PROCID tells them apart.
        inputs: files whose content the result depends on.
        outputs: files that exist when it has succeeded.
        env: added to the environment.
        resumes: a checkpoint in a folder of its own that an unfinished job continues from.  The
            folder belongs to one configuration: a job of another one refuses it.
        here: too small for a queue.
        regardless: flags of the command whose values leave the result as it is.
    """

    name: str
    argv: tuple[str, ...]
    log: Path
    gpus: int = 0
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    resumes: Path | None = None
    here: bool = False
    regardless: tuple[str, ...] = ()
    cpus: int = 1
    nodes: int = 1
    tasks: int = 1

    @property
    def marker(self) -> Path:
        """Where it is written down that the job is done."""
        return self.log.with_suffix(".job.json")

    def shell(self) -> str:
        """The command as one types it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*settings, shlex.join(self.argv)])

    def why(self) -> list[str]:
        """Why it has to run, in words; empty if it is up to date."""
        marker = markers.read(self.marker)
        if marker is None:
            return ["not run yet"]
        found = markers.changes(marker.get("fingerprint"), markers.fingerprint(self))
        if not found and marker.get("state") != "done":
            found = [f"it {marker.get('state')} before"]
        return found or [f"{path} is gone" for path in self.outputs if not path.exists()]
