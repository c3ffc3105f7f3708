#!/usr/bin/env python3
"""Plants each fault of tools/faults.yaml in a copy of the project, and asks the tests to find it.

    tools/mutation_check.py [NAME...]

A fault that no test finds is printed and makes the exit code 1.  Each takes seconds to minutes.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """Text of a file replaced by other text, and the tests that should notice."""

    file: str
    good: str
    bad: str
    tests: str


FAULTS = {
    name: Fault(file, **fault)
    for file, faults in yaml.safe_load((ROOT / "tools/faults.yaml").read_text("utf-8")).items()
    for name, fault in faults.items()
}


def found(fault: Fault) -> bool:
    """Whether a test fails because of the fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("espnet_pl", "test", "egs", "tools", "pyproject.toml"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__", "venv", "dump", "exp", "log")
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=ignored)
            else:
                shutil.copy(source, copy / name)
        target = copy / fault.file
        text = target.read_text()
        if fault.good not in text:
            raise SystemExit(
                f"{fault.file} does not hold {fault.good!r} any more: mend tools/faults.yaml"
            )
        target.write_text(text.replace(fault.good, fault.bad))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "--deselect", "test/methods/test_sixth_method.py", *fault.tests.split()],
            cwd=copy,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout + done.stderr)
        return done.returncode == 1


def main() -> None:
    """All faults, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a fault (all)")
    names = parser.parse_args().names or [*FAULTS]
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"no fault of tools/faults.yaml is named {unknown[0]!r}")
    survived = []
    for name in names:
        began = time.time()
        caught = found(FAULTS[name])
        survived += [] if caught else [name]
        print(
            f"{'caught' if caught else 'SURVIVED':9} {time.time() - began:4.0f} s  {name}",
            flush=True,
        )
    print(f"{len(survived)} survived")
    raise SystemExit(bool(survived))


if __name__ == "__main__":
    main()
