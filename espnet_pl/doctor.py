"""Looks whether everything the recipes need is there: ``python -m espnet_pl.doctor [--quick]``.

One line per check, and after each problem how to solve it. The exit code is 1 only if something
that every recipe needs is missing or does not work.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OK, MISSING, WRONG = "ok", "missing", "wrong"

# What tools/install.sh installs; each ESPnet release supports only these Pythons.
ESPNET_OF_PYTHON = {(3, 10): "202511", (3, 11): "202511", (3, 12): "202611", (3, 13): "202611"}

# The stock programs the recipes start. All but the last two take seconds to import.
ENTRY_POINTS = (
    "espnet2.bin.asr_train",
    "espnet2.bin.asr_inference",
    "espnet2.bin.asr_transducer_inference",
    "espnet2.bin.tokenize_text",
    "espnet2.bin.pack",
)

INSTALL = "tools/install.sh"


@dataclass(frozen=True)
class Check:
    """The answer to one question.

    Args:
        name: what was looked at.
        state: ``ok``, ``missing`` or ``wrong``.
        detail: a version, a path, or what is wrong.
        remedy: how to get it; shown unless ``state`` is ``ok``.
        required: whether every recipe needs it.
    """

    name: str
    state: str
    detail: str = ""
    remedy: str = ""
    required: bool = True

    @property
    def fatal(self) -> bool:
        """Whether no recipe can run because of it."""
        return self.required and self.state != OK

    def __str__(self) -> str:
        state = self.state + ("" if self.required or self.state == OK else " (optional)")
        line = f"{state:18} {self.name:24} {self.detail}".rstrip()
        return line if self.state == OK else f"{line}\n{'':18} -> {self.remedy}"


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None; imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> Check:
    """Whether an ESPnet release supports this Python."""
    supported = sys.version_info[:2] in ESPNET_OF_PYTHON
    return Check(
        "python",
        OK if supported else WRONG,
        f"{platform.python_version()} {sys.executable}",
        f"use Python 3.10 to 3.13: {INSTALL} --python python3.11",
    )


def espnet() -> Check:
    """Whether ESPnet is there, once, and in a release these recipes are tested with."""
    version = version_of("espnet")
    spec = importlib.util.find_spec("espnet2")
    wanted = ESPNET_OF_PYTHON.get(sys.version_info[:2], "202611")
    if spec is None or not spec.origin:
        return Check("espnet", MISSING, f"{wanted} wanted", INSTALL)
    where = os.path.dirname(spec.origin)
    # An old checkout on PYTHONPATH hides the installed one, and nothing says so.
    strays = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if os.path.realpath(os.path.dirname(where)) in map(os.path.realpath, strays):
        return Check("espnet", WRONG, f"comes from PYTHONPATH: {where}", "unset PYTHONPATH")
    if (version or "").split(".")[0] not in ESPNET_OF_PYTHON.values():
        remedy = f"not tested; {wanted} is: {INSTALL} in a shell without this environment"
        return Check("espnet", WRONG, f"{version or 'unknown version'} {where}", remedy, False)
    return Check("espnet", OK, f"{version} {where}")


def package(distribution: str, purpose: str, required: bool = True) -> Check:
    """Whether a distribution is installed."""
    version = version_of(distribution)
    if version:
        return Check(distribution, OK, version, required=required)
    remedy = f"{INSTALL}, or: python3 -m pip install {distribution}"
    return Check(distribution, MISSING, purpose, remedy, required)


def packages() -> Iterator[Check]:
    """The libraries that ESPnet and espnet_pl import directly."""
    yield package("torch", "models, losses, training")
    yield package("torchaudio", "ESPnet's models import it")
    yield package("numpy", "arrays")
    yield package("scipy", "ESPnet imports it")
    yield package("soundfile", "reads audio")
    if sys.version_info < (3, 12):
        yield package("kaldiio", "Kaldi's scp and ark files")
    else:
        yield package("omniio", "Kaldi's scp and ark files")
    yield package("sentencepiece", "BPE tokens")
    yield package("editdistance", "error rates while training")
    yield package("jiwer", "word error rates")
    yield package("scikit-learn", "clusters of frames")
    yield package("jaxtyping", "tensor shapes as annotations")
    yield package("submitit", "submits jobs to Slurm (--cmd slurm)", required=False)
    yield package("espeakng-loader", "speaks the corpus of mini_alnum", required=False)


def start_up() -> Check:
    """Whether ESPnet 202511 starts in 3 seconds or in 9."""
    slow = [
        f"{name} {version}"
        for name, fast in (("typeguard", 2), ("inflect", 5))
        if (version := version_of(name)) and int(version.split(".")[0]) > fast
    ]
    if not slow or sys.version_info >= (3, 12):
        return Check("start-up time", OK, "typeguard, inflect", required=False)
    remedy = "python3 -m pip install typeguard==2.13.3 inflect==5.6.2"
    return Check("start-up time", WRONG, ", ".join(slow) + ": slow start only", remedy, False)


def import_in_child(modules: tuple[str, ...], timeout: float = 300) -> dict[str, str]:
    """The error of importing each module, '' where there is none.

    In a child process: a broken native library may end the interpreter instead of raising.
    """
    program = textwrap.dedent(
        """
        import contextlib, importlib, json, os, sys
        answer = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a module prints while it is imported is no answer
        for module in sys.argv[1:]:
            try:
                importlib.import_module(module)
                error = ""
            except BaseException as exception:
                error = f"{type(exception).__name__}: {exception}"
            print(json.dumps([module, error]), file=answer, flush=True)
        """
    )
    command = [sys.executable, "-c", program, *modules]
    try:
        run = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=timeout, text=True
        )
        output, end = run.stdout, f"the interpreter ended with code {run.returncode}"
    except subprocess.TimeoutExpired as expired:
        # text=True does not hold for what was read before the time was up
        output = (expired.stdout or b"").decode()
        end = f"not imported after {timeout:g} s"
    errors = dict(json.loads(line) for line in output.splitlines())
    return {module: errors.get(module, end) for module in modules}


def imports() -> Iterator[Check]:
    """Whether the libraries with native code and ESPnet's programs can be imported."""
    modules = ("torch", "torchaudio", "soundfile", "scipy.signal", "sentencepiece", *ENTRY_POINTS)
    remedies = {
        "torchaudio": "a build for another torch; keep its Python part, which is all ESPnet needs: "
        "delete the .so files in its lib folder",
        "soundfile": "without a ready-made build it needs libsndfile: apt-get install libsndfile1",
    }
    for module, error in import_in_child(modules).items():
        first = error.splitlines()[0][:160] if error else ""
        lost = error.startswith("ModuleNotFoundError")
        state = OK if not error else MISSING if lost else WRONG
        yield Check(f"import {module}", state, first, remedies.get(module, INSTALL))


def threads() -> Check:
    """Whether OpenMP is told how many threads to use: more than there are cores is far slower."""
    number = os.environ.get("OMP_NUM_THREADS")
    if number:
        return Check("threads", OK, f"OMP_NUM_THREADS={number}", required=False)
    remedy = "path.sh sets it to 1; by hand: export OMP_NUM_THREADS=1"
    return Check("threads", WRONG, "OMP_NUM_THREADS is not set", remedy, False)


def gpu(quick: bool) -> Check:
    """Whether torch can use the GPU that the driver sees."""
    if not shutil.which("nvidia-smi"):
        return Check("gpu", OK, "none: training runs on the CPU", required=False)
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    names = [line.split("(")[0].strip() for line in listed.stdout.splitlines() if "GPU" in line]
    if not names:
        return Check("gpu", OK, "nvidia-smi lists none", required=False)
    if not quick and importlib.util.find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            detail = f"{names[0]}, but torch {torch.__version__} cannot use it"
            remedy = f"{INSTALL} --cuda; if that does not help, the driver is older than this CUDA"
            return Check("gpu", WRONG, detail, remedy, False)
    # CUDA builds of torch bring Triton; without it the same is computed, with many more launches.
    triton = version_of("triton")
    triton = f"triton {triton}" if triton else "no triton: no kernels for the transducer's loss"
    return Check("gpu", OK, f"{len(names)} x {names[0]}, {triton}", required=False)


def program(name: str, purpose: str, remedy: str) -> Check:
    """Whether an optional program is in PATH."""
    where = shutil.which(name)
    return Check(name, OK if where else MISSING, where or purpose, remedy, False)


def programs() -> Iterator[Check]:
    """The optional programs."""
    remedy = "only on a cluster's login node; without it: --cmd local"
    lost = [name for name in ("sbatch", "squeue") if not shutil.which(name)]
    detail = f"no {', '.join(lost)}: no --cmd slurm" if lost else "sbatch, squeue"
    yield Check("slurm", MISSING if lost else OK, detail, remedy, False)
    purpose = "for corpora in other formats than wav and flac"
    yield program("ffmpeg", purpose, "apt-get install ffmpeg")
    sctk = "/usr/lib/sctk/bin/sclite"  # Debian keeps it out of PATH
    if not shutil.which("sclite") and os.access(sctk, os.X_OK):
        yield Check("sclite", OK, sctk, required=False)
    else:
        yield program(
            "sclite",
            "NIST's scoring tables; error rates need only jiwer",
            "apt-get install sctk (the sctk that pip knows is another program)",
        )


def checks(quick: bool) -> Iterator[Check]:
    """All of them, in the order they are shown; ``quick`` leaves out those that import."""
    yield python()
    yield espnet()
    yield from packages()
    yield start_up()
    if not quick:
        yield from imports()
    yield threads()
    yield gpu(quick)
    yield from programs()


def main(arguments: list[str] | None = None, show: Callable[[str], object] = print) -> int:
    """Shows every check and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m espnet_pl.doctor", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out the imports (seconds)")
    quick = parser.parse_args(arguments).quick
    fatal = 0
    for check in checks(quick):
        show(str(check))
        fatal += check.fatal
    show(f"{fatal} problem(s) that every recipe would meet" if fatal else "ready")
    return 1 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
