"""What install.sh, the lock files and path.sh promise, without installing anything."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "tools/install.sh"
LOCKS = sorted((ROOT / "tools/requirements").glob("*.txt"))


def run(*command, env=None, cwd=ROOT):
    """The finished process; no environment is active in it unless ``env`` says so."""
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    command = [str(word) for word in command]
    return subprocess.run(
        command, cwd=cwd, env={**clean, **(env or {})}, capture_output=True, text=True, timeout=60
    )


def pins(path):
    """The lines of a lock file without comments, following -r."""
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            yield from pins(path.parent / line[3:])
        elif line:
            yield line


@pytest.fixture
def checkout(tmp_path):
    """A copy of what install.sh reads."""
    shutil.copytree(ROOT / "tools/requirements", tmp_path / "tools/requirements")
    shutil.copy(INSTALL, tmp_path / "tools")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def fake_python(folder, name, version, has_venv=True):
    """A program that answers like a Python of this version."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *version_info*) echo {version} ;; *ensurepip*) exit {int(not has_venv)} ;; '
        "*) echo 'No space left on device'; exit 1 ;; esac\n"
    )
    program.chmod(0o755)


def path_with(folder):
    """A PATH of the programs install.sh needs and the given ones, but no other Python."""
    folder.mkdir(exist_ok=True)
    for name in "bash sh awk cat cksum cut df dirname grep ls mkdir printf rm sed tail".split():
        if (where := shutil.which(name)) and not (folder / name).exists():
            (folder / name).symlink_to(where)
    return {"PATH": str(folder)}


def test_help_names_every_option():
    shown = run(INSTALL, "--help")
    assert shown.returncode == 0
    for option in "--venv --python --cuda --no-cuda --test --check --help".split():
        assert re.search(rf"^  {option}\b", shown.stdout, re.MULTILINE), option


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("--pyhton", "--python"),
        ("--cud", "--cuda"),
        ("--tests", "--test"),
        ("--nocuda", "--no-cuda"),
    ],
)
def test_unknown_option_is_refused_with_the_nearest(typo, meant):
    refused = run(INSTALL, typo)
    assert refused.returncode == 1
    assert f"unknown option {typo}" in refused.stderr
    assert f"did you mean {meant}?" in refused.stderr


@pytest.mark.parametrize("arguments", [["--venv"], ["--venv="], ["--python", ""]])
def test_option_without_its_value_is_refused(arguments):
    refused = run(INSTALL, *arguments)
    assert refused.returncode == 1
    assert "needs a value" in refused.stderr


def test_check_fails_without_an_environment(checkout):
    start = time.monotonic()
    assert run(checkout / "tools/install.sh", "--check").returncode == 1
    assert time.monotonic() - start < 1
    assert not (checkout / "tools/venv").exists()


def test_every_unsuitable_python_is_named(checkout, tmp_path):
    fake_python(tmp_path / "bin", "python3.11", "3.11", has_venv=False)
    fake_python(tmp_path / "bin", "python3", "3.8")
    failed = run(checkout / "tools/install.sh", env=path_with(tmp_path / "bin"))
    assert failed.returncode == 1
    assert "no suitable Python" in failed.stderr
    assert "apt-get install python3.11-venv" in failed.stderr
    assert "python3 is Python 3.8" in failed.stderr


def test_failed_step_shows_its_output_and_a_remedy(checkout, tmp_path):
    fake_python(tmp_path / "bin", "python3.11", "3.11")
    failed = run(checkout / "tools/install.sh", env=path_with(tmp_path / "bin"))
    assert failed.returncode == 1
    assert "| No space left on device" in failed.stderr
    assert "-> the disk is full" in failed.stderr
    assert run(checkout / "tools/install.sh", "--check").returncode == 1


def test_foreign_environment_is_not_touched(checkout, tmp_path):
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "pyvenv.cfg").write_text("home = /usr/bin\n")
    fake_python(tmp_path / "bin", "python3.11", "3.11")
    arguments = ("--venv", foreign)
    failed = run(checkout / "tools/install.sh", *arguments, env=path_with(tmp_path / "bin"))
    assert failed.returncode == 1
    assert "was not made by install.sh" in failed.stderr
    assert [path.name for path in foreign.iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_is_pinned_and_says_why(lock):
    for line in lock.read_text().splitlines():
        if not line or line.startswith(("#", "-r ")):
            continue
        requirement, _, why = line.partition("#")
        where = r'(; python_version [<>=]+ "3\.\d+"|; platform_system == "Linux")?'
        assert re.fullmatch(rf"[\w.-]+==[\w.]+{where} *", requirement), line
        assert why.strip(), f"{lock.name}: {line}: why is it there?"


@pytest.mark.parametrize(
    "lock", ["espnet-202511.txt", "espnet-202611.txt", "torch.txt", "test.txt"]
)
def test_lock_names_nothing_twice(lock):
    seen = [
        (re.split(r"==", line)[0].lower(), "<" in line) for line in pins(LOCKS[0].parent / lock)
    ]
    assert len(seen) == len(set(seen))


def test_setup_asks_only_for_what_the_locks_have():
    source = (ROOT / "setup.py").read_text()
    wanted = re.search(r"install_requires=\[(.*?)\]", source, re.DOTALL).group(1)
    locked = {re.split(r"==", line)[0].lower() for name in LOCKS for line in pins(name)}
    assert set(re.findall(r'"([\w-]+)', wanted)) <= locked


def test_nothing_in_the_scripts_is_an_index_address():
    for path in [INSTALL, *LOCKS, ROOT / "setup.py"]:
        assert "://" not in path.read_text(), path


def test_path_sh_uses_the_active_python_and_is_quick(tmp_path):
    look = "import espnet_pl; print(espnet_pl.__file__)"
    installed = run(sys.executable, "-c", look, cwd=tmp_path).stdout.startswith(f"{ROOT}/")
    assert installed, "tools/install.sh has not been run; path.sh would run it here"
    program = ". ./path.sh; echo $(command -v python3) $OMP_NUM_THREADS $PYTHONIOENCODING"
    recipe = ROOT / "egs/mini_alnum/pl1"
    inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "VIRTUAL_ENV")}
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    environment = {**inherited, "PATH": path}
    times = []
    for _ in range(3):
        start = time.monotonic()
        shown = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", program],
            cwd=recipe,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        times.append(time.monotonic() - start)
    assert shown.returncode == 0, shown.stderr
    python, threads, encoding = shown.stdout.split()
    assert os.path.samefile(os.path.dirname(python), os.path.dirname(sys.executable))
    assert (threads, encoding) == ("1", "UTF-8")
    assert min(times) < 1  # 0.1 s; the rest is for a busy machine


def test_shell_scripts_are_clean():
    scripts = [ROOT / ".ci/run", *(ROOT / "tools").glob("*.sh"), *(ROOT / "egs").glob("*/pl1/*.sh")]
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = beside if beside.exists() else "shellcheck"
    checked = run(shellcheck, *scripts, *(ROOT / "egs").glob("*/pl1/local/*.sh"))
    assert checked.returncode == 0, checked.stdout
