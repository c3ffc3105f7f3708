"""What a finished job leaves behind, so that it is not run again until something changed.

A marker is a JSON file beside the job's log with a fingerprint of the command and of the content
of every input.  Times of files play no part (but for files over 64 MB): a checkout, a copy or a
clock that is wrong must not make a result old, and a fresh-looking file must not make it new.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

BIG = 64 * 2**20  # hashing more than this would make an idle run slow
# Where and how many at a time: the result is the same, so a change does not make it old.
VOLATILE = ("--ngpu", "--nj", "--num_processes")
# Made by runs, after their commit.
RESULTS = (":(top,exclude)*RESULTS.md", ":(top,exclude)docs/studies/data")
# The state of a job that is in Slurm's hands, whatever it does there.
SUBMITTED = "was submitted"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(path: Path) -> Any:
    """The content of a YAML file (by the fast loader where there is one)."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def read(path: Path) -> dict | None:
    """A marker, or None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write(path: Path, content: Mapping) -> None:
    """Writes a marker; it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def content(path: Path) -> Any:
    """What of a file counts: a YAML's meaning without the driver's own options, else its hash."""
    if not path.is_file():
        return None
    status = path.stat()
    if path.suffix == ".yaml":
        meaning = load_yaml(path)
        if isinstance(meaning, dict):
            meaning.pop("recipe", None)
        # A comment changes nothing.  Small ones are kept whole, to say later what changed.
        text = json.dumps(meaning, sort_keys=True, default=str)
        return meaning if len(text) < 20_000 else hashlib.sha256(text.encode()).hexdigest()
    if status.st_size > BIG:
        return f"{status.st_size} bytes of {status.st_mtime_ns}"
    return _hash(str(path.resolve()), status.st_size, status.st_mtime_ns)


@functools.cache
def _hash(path: str, size: int, mtime: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fingerprint(job) -> dict:
    """Everything the result of a `launch.Job` depends on."""
    argv, skip, volatile = [], False, (*VOLATILE, *job.regardless)
    for word in job.argv:
        if not skip and word not in volatile:
            argv.append(word)
        skip = not skip and word in volatile
    inputs = {str(path): content(path) for path in job.inputs}
    # Through JSON, to be equal to what is read back (keys are strings, tuples lists).
    found = {"argv": argv, "env": dict(job.env), "inputs": inputs}
    return json.loads(json.dumps(found, default=str))


def changes(old: Mapping | None, new: Mapping) -> list[str]:
    """What differs between two fingerprints, in words; empty if they agree."""
    if old is None:
        return ["no record of an earlier run"]
    found = []
    if old.get("argv") != new["argv"]:
        before, after = _flags(old.get("argv") or []), _flags(new["argv"])
        gone = [flag for flag in before if flag not in after]
        come = [flag for flag in after if flag not in before]
        found.append(f"command: {', '.join(gone) or 'nothing'} -> {', '.join(come) or 'nothing'}")
    if old.get("env") != new["env"]:
        found.append(f"environment: {old.get('env')} -> {new['env']}")
    before = old.get("inputs") or {}
    for path in sorted({*before, *new["inputs"]}):
        a, b = before.get(path), new["inputs"].get(path)
        if isinstance(a, dict) and isinstance(b, dict):
            a, b = _flat(a), _flat(b)
            for key in sorted({*a, *b}):
                if a.get(key) != b.get(key):
                    found.append(f"{path}: {key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}")
        elif a != b and path in before and path in new["inputs"]:
            found.append(f"{path} changed")
    return found


def _flags(argv: list[str]) -> list[str]:
    """``--flag value`` pairs, each as one word."""
    words: list[str] = []
    for word in argv:
        if words and words[-1].startswith("--") and " " not in words[-1] and word[:2] != "--":
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key in tree for k, v in _flat(tree[key], f"{prefix}.{key}".strip(".")).items()}


def version(package: str) -> str:
    """The version of an installed package, found without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        import espnet_pl  # runs from a checkout without being installed

        return espnet_pl.__version__ if package == "espnet_pl" else "not installed"


@functools.cache
def environment() -> dict[str, str]:
    """With what a result was made: commit, versions, machine."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "espnet", "espnet_pl")},
        "machine": f"{_cpu()}, {os.cpu_count()} cores" + "".join(f", {gpu}" for gpu in _gpus()),
    }


def commit() -> str:
    """The git commit of this checkout, ``+ local changes`` where tracked files differ from it."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # An installed copy may lie in a repository of something else.
        ours = git("ls-files", "--", __file__)
        head = git("rev-parse", "--short=12", "HEAD") if ours else ""
        # A result file is made after its commit, and differs from it by nature.
        dirty = git("status", "--porcelain", "-uno", "--", ":(top)", *RESULTS)
    except OSError:  # no git here
        head, dirty = "", ""
    return (head or "unknown") + (" + local changes" if dirty and head else "")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.splitlines() if found.returncode == 0 else []
