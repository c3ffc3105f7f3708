"""A corpus whose data a recipe makes small, in a copy of it."""

import contextlib
import functools
import hashlib
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from espnet_pl.data import kaldi, validate

ROOT = Path(__file__).parents[2]
SHARED = os.environ.get("ESPNET_PL_SHARED")
needs_speech = pytest.mark.skipif(
    not SHARED, reason="ESPNET_PL_SHARED is not set (a folder with data/an4 and data/fsdd)"
)
# The sizes that still fill every set.
SMALL = {
    "mini_alnum": "--labelled_minutes 0.3 --unlabelled_minutes 0.4 --dev_minutes 0.2 "
    "--test_minutes 0.3",
    "fsdd": "--labelled_strings 12 --unlabelled_strings 12 --dev_strings 9 --test_strings 9",
    "an4": "--generated_minutes 0.3 --generated_speakers 6",
}


def copy_recipe(corpus, folder):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / f"egs/{corpus}/pl1/local", folder / "local")
    with contextlib.suppress(FileNotFoundError):
        shutil.copy(ROOT / f"egs/{corpus}/pl1/db.sh", folder)
    return folder


def data_sh(folder, options="", **environment):
    """Runs local/data.sh as the stage driver does; returns (status, stdout, stderr)."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ours = ("dumpdir", "local_data_opts", "AN4", "FSDD")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        ["local/data.sh", *options.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**kept, "PATH": path, "PYTHONPATH": python_path, **environment},
    )
    return done.returncode, done.stdout, done.stderr


def made_by_data_sh(folder, times=False):
    """Every file below data/ and dump/: its digest and, if asked, when it was written."""
    files = [p for top in ("data", "dump") for p in (folder / top).rglob("*") if p.is_file()]
    return {
        str(p.relative_to(folder)): (
            hashlib.sha256(p.read_bytes()).hexdigest(),
            p.stat().st_mtime_ns if times else 0,
        )
        for p in files
        if p.name != validate.CACHE
    }


def load(corpus):
    path = ROOT / f"egs/{corpus}/pl1/local/prepare_corpus.py"
    spec = importlib.util.spec_from_file_location(f"{corpus}_corpus", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        patch.setattr(sys, "dont_write_bytecode", True)  # local/ is the recipe's input
        spec.loader.exec_module(module)
    return module


def read(folder, name):
    return kaldi.read_dir(folder / "data" / name)


def speakers(folder, name):
    return {u.speaker for u in read(folder, name)}


@contextlib.contextmanager
def serving(folder):
    """The folder by HTTP on this machine; gives its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname="repository-0123abc")
