"""What the doctor says about environments that have or lack something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from espnet_pl import doctor

ROOT = Path(__file__).resolve().parents[1]


def lines(*arguments):
    shown = []
    return doctor.main(list(arguments), shown.append), shown


def test_this_environment_is_ready():
    code, shown = lines("--quick")
    assert code == 0, "\n".join(shown)
    assert shown[-1] == "ready"
    assert any(line.split()[:2] == ["ok", "torch"] for line in shown)


def test_quick_imports_neither_torch_nor_espnet():
    program = (
        "import sys, espnet_pl.doctor as d; d.main(['--quick'], lambda line: None);"
        "print({'torch', 'espnet2', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_missing_requirement_is_fatal_and_says_how_to_get_it(monkeypatch):
    version_of = doctor.version_of
    monkeypatch.setattr(
        doctor, "version_of", lambda name: None if name == "jiwer" else version_of(name)
    )
    code, shown = lines("--quick")
    assert code == 1
    (line,) = [line for line in shown if " jiwer " in line]
    assert line.startswith("missing ")
    assert "-> tools/install.sh" in line
    assert shown[-1].startswith("1 problem")


def test_missing_option_is_not_fatal(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    code, shown = lines("--quick")
    assert code == 0
    for name in ("slurm", "ffmpeg"):
        assert any(line.startswith("missing (optional)") and f" {name} " in line for line in shown)


def test_unsupported_python_is_fatal(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 18))
    check = doctor.python()
    assert check.fatal and check.state == doctor.WRONG and "--python" in check.remedy


@pytest.mark.parametrize(
    "version, state", [("202511", "ok"), ("202611", "ok"), ("202402", "wrong"), (None, "wrong")]
)
def test_espnet_version(monkeypatch, version, state):
    monkeypatch.setattr(doctor, "version_of", lambda name: version)
    check = doctor.espnet()
    assert check.state == state
    assert not check.fatal


def test_espnet_that_hides_the_installed_one(monkeypatch, tmp_path):
    (tmp_path / "espnet2").mkdir()
    (tmp_path / "espnet2/__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "espnet2", raising=False)
    check = doctor.espnet()
    assert check.fatal and "PYTHONPATH" in check.detail


@pytest.mark.parametrize(
    "versions, state",
    [
        ({"typeguard": "2.13.3", "inflect": "5.6.2"}, "ok"),
        ({"typeguard": "4.6.0", "inflect": "7.5.0"}, "wrong"),
        ({}, "ok"),
    ],
)
def test_slow_start_is_only_a_warning(monkeypatch, versions, state):
    monkeypatch.setattr(doctor, "version_of", versions.get)
    monkeypatch.setattr(doctor.sys, "version_info", (3, 11, 0))
    check = doctor.start_up()
    assert check.state == state
    assert not check.fatal


def test_imports_survive_whatever_a_module_does(monkeypatch, tmp_path):
    modules = {
        "fine": "print('noise')",
        "raises": "raise OSError('libcudart.so.13: no such file')",
        "leaves": "raise SystemExit(3)",
        "crashes": "import os; os._exit(7)",
        "after": "",
    }
    for name, source in modules.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    errors = doctor.import_in_child(
        ("fine", "raises", "nowhere_at_all", "leaves", "crashes", "after")
    )
    assert errors["fine"] == ""
    assert errors["raises"] == "OSError: libcudart.so.13: no such file"
    assert errors["nowhere_at_all"].startswith("ModuleNotFoundError")
    assert errors["leaves"] == "SystemExit: 3"
    assert errors["crashes"] == errors["after"] == "the interpreter ended with code 7"


def test_import_that_hangs(monkeypatch, tmp_path):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    errors = doctor.import_in_child(("json", "hangs"), timeout=2)
    assert errors == {"json": "", "hangs": "not imported after 2 s"}


def test_failed_import_is_shown_with_its_remedy(monkeypatch):
    error = "OSError: libcudart.so.13"
    monkeypatch.setattr(
        doctor, "import_in_child", lambda modules: {m: error * (m == "torchaudio") for m in modules}
    )
    (bad,) = [check for check in doctor.imports() if check.state != "ok"]
    assert bad.fatal and bad.state == "wrong" and ".so files" in str(bad)


def test_unset_threads_are_a_warning(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert doctor.threads().state == "wrong" and not doctor.threads().fatal
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.threads().state == "ok"


def test_checks_fit_one_line():
    for check in doctor.checks(quick=True):
        assert "\n" not in json.dumps(str(check).split("->")[0].strip())


@pytest.mark.parametrize(("triton", "said"), [("3.7.1", "triton 3.7.1"), (None, "no triton: ")])
def test_a_gpu_is_shown_with_its_compiler(triton, said, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    listed = subprocess.CompletedProcess([], 0, stdout="GPU 0: NVIDIA H100 (UUID: GPU-1)\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: listed)
    monkeypatch.setattr(doctor, "version_of", {"triton": triton}.get)
    check = doctor.gpu(quick=True)
    assert check.state == "ok" and f"1 x GPU 0: NVIDIA H100, {said}" in check.detail
