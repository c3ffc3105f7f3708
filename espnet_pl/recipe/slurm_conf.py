"""How needs of jobs become options of sbatch: ``conf/slurm.conf``, in the syntax of Kaldi."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from espnet_pl.recipe import slurm_job
from espnet_pl.recipe.job import Job, LaunchError

CONF = Path("conf/slurm.conf")
NOTICE = "--signal=B:USR2@120"  # to the batch script only, so many seconds before the time limit
# What a job needs when it needs nothing special: a file that does not mention it is right.
NOTHING = {"gpu": "0", "num_threads": "1", "num_nodes": "1"}


def parse(path: Path) -> tuple[list[str], dict, dict]:
    """A file in Kaldi's syntax: the command, what options become, values of those not given."""
    command, options, default = ["sbatch"], {}, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = re.sub(r"(^|\s+)#.*", "", line).strip()
        if not text:
            continue
        if found := re.fullmatch(r"command\s+(.+)", text):
            command = shlex.split(found[1])
        elif found := re.fullmatch(r"option\s+([^=\s]+)=(\S+)(?:\s+(.*))?", text):
            options[found[1], found[2]] = found[3] or ""
        elif found := re.fullmatch(r"default\s+([^=\s]+)=(\S+)", text):
            default[found[1]] = found[2]
        else:
            raise LaunchError(
                f"{path}:{number}: not understood: {line.strip()}\nThere is: command sbatch ...; "
                "option NAME=VALUE ...; option NAME=* ... $0; default NAME=VALUE"
            )
    return command, options, default


class Conf:
    """What sbatch is told of jobs.

    Args:
        extra: more options for sbatch, in one string; they come after the file's, and win.
        conf: the file, if another.
    """

    def __init__(self, extra: str = "", conf: Path = CONF):
        if not conf.exists():
            raise LaunchError(f"--cmd slurm: no {conf}; copy it from another recipe")
        self.conf = conf
        self.command, self.options, self.default = parse(conf)
        try:
            self.extra = shlex.split(extra)
        except ValueError as error:
            raise LaunchError(f"--slurm_opts {extra}: {error}") from None

    def lines(self, job: Job) -> list[str]:
        """Options of sbatch for a job."""
        name = re.sub(r"\W+", "_", job.name)
        needs = {"name": name, "gpu": job.gpus, "num_threads": job.cpus, "num_nodes": job.nodes}
        lines = [" ".join(self.command[1:])] if self.command[1:] else []
        for key, value in {**self.default, **{k: str(v) for k, v in needs.items()}}.items():
            text = self.options.get((key, value), self.options.get((key, "*")))
            if text is not None:
                lines.append(text.replace("$0", value))
            elif key == "name":
                lines.append(f"--job-name {value}")
            elif NOTHING.get(key) != value:
                raise LaunchError(
                    f"{job.name} needs {key}={value}, and {self.conf} does not say how to ask for "
                    f"it: add 'option {key}=* ... $0'"
                )
        if job.tasks > 1:
            lines.append(f"--ntasks-per-node {job.tasks}")
        lines = [line for line in lines if line] + ([shlex.join(self.extra)] if self.extra else [])
        given = " ".join(lines)
        # Node failures and preemption put a job back, unless the site says otherwise.
        lines += [] if "--requeue" in given or "--no-requeue" in given else ["--requeue"]
        lines += [] if "--signal" in given else [NOTICE]
        log = str(job.log).replace("%", "%%")  # Slurm's patterns begin with it
        return [*lines, f"--output {shlex.quote(log)} --open-mode append"]

    def script(self, job: Job) -> str:
        """A batch script, submitted as it stands: by hand, in the recipe's folder."""
        if job.here:
            return job.shell()
        several = job.nodes * job.tasks > 1
        starter = shlex.join([*(slurm_job.srun(job) if several else []), *job.argv])
        notice = [] if job.resumes else [NOTICE]  # which would end what cannot save
        lines = [f"#SBATCH {line}" for line in self.lines(job) if line not in notice]
        lines += exports(job.env)
        return "\n".join(
            [f"mkdir -p {job.log.parent} && sbatch <<'SBATCH'", "#!/usr/bin/env bash", *lines,
             ". ./path.sh", f"exec {starter}", "SBATCH"]
        )  # fmt: skip


def exports(more: Mapping[str, str]) -> list[str]:
    """What sets a job's own variables, and those of local/data.sh.

    A site's --export need not mention them.
    """
    corpus = re.escape(Path.cwd().parent.name.upper())
    wanted = re.compile(rf"local_data_opts|{corpus}|(ESPNET_PL|{corpus})_\w*")
    ours = {name: value for name, value in os.environ.items() if wanted.fullmatch(name)}
    return [f"export {name}={shlex.quote(value)}" for name, value in {**ours, **more}.items()]
