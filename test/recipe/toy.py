"""Calls of the driver in which every command is a stand-in: it writes the job's outputs, made of
the content of its inputs, so that a change travels as it would.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from espnet_pl.recipe import check, cli, config, markers, parts, stages, teachers
from espnet_pl.recipe.runs import load_runs, write_phases

ROOT = Path(__file__).parents[2]
STARTED: list[str] = []
BAD: set[str] = set()


def verdicts(configurations):
    """In place of the bridge: by the method's name; ``taught`` asks for what its settings say."""
    found = []
    for files in configurations:
        merged = {}
        for file in files:
            merged |= markers.load_yaml(Path(file)) or {}
        taught = merged["method"] == "taught"
        asked = f"beam {merged.get('method_conf', {}).get('beam')}" if taught else None
        unlabelled = taught or merged["method"] in ("slimipl", "lpm")
        of_text = merged["method"] == "lpm"
        uses = ["language_model"] * of_text + ["teachers"] * (merged["method"] != "supervised")
        found.append(check.Verdict(unlabelled, taught, asked, of_text, uses)._asdict())
    return found


def stand_in(job, log, devices):
    STARTED.append(job.name)
    if job.name in BAD:
        return subprocess.Popen(["sh", "-c", "echo it broke; exit 1"], stdout=log)
    if job.name.split()[0] in ("measure", "record") or "espnet_pl.recipe.parts" in job.argv:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, *job.argv[1:]], stdout=log, stderr=log, env=env)
    made = hashlib.sha256(" ".join(job.argv).encode())
    for path in job.inputs:
        made.update(path.read_bytes() if path.suffix != ".json" else b"")
    keys = []
    if "--key_file" in job.argv:
        keys = parts.keys(Path(job.argv[job.argv.index("--key_file") + 1]))
    for path in [*job.outputs, *([job.resumes] if job.resumes else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name in ("wav.scp", "text") and not keys:
            path.write_text("s1-a one\ns1-b two\ns2-c three\n")
        elif path.suffix == ".yaml":
            path.write_text(f"made: {made.hexdigest()}\n")
        else:
            path.write_text("".join(f"{key} one\n" for key in keys) or made.hexdigest())
    return subprocess.Popen(["true"], stdout=log)


def call(*words):
    """Runs the driver; returns its exit code and the names of the commands it started."""
    STARTED.clear()
    code = cli.main(["--nj", "1", *words])
    return code, list(STARTED)


def plan(chosen=("slimipl",), seeds=(1,), **more):
    recipe = config.load_recipe()
    runs = load_runs(recipe, more.get("asr", config.ASR))
    write_phases(runs.values())
    found = verdicts([run.files for run in runs.values()])
    known = {name: check.Verdict(**verdict) for name, verdict in zip(runs, found)}
    teachers.refuse(runs, known)
    check.refuse_unused(runs, known)
    return stages.Plan(
        recipe,
        runs,
        chosen,
        seeds,
        known,
        **more,
    )


def tree():
    return {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")}
