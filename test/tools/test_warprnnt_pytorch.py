"""tools/warprnnt_pytorch: brute force · golden number · refusals · installed twice, removed."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import venv

import pytest
import torch

from espnet_pl.losses import transducer
from test.losses.test_logits import FRAMES, LABELS, LENGTHS, dense, example
from test.tools.test_install import ROOT

INSTALL = ROOT / "tools/install_warprnnt.sh"
VERSION = "import warprnnt_pytorch as w; print(w.__version__)"


def load():
    """The package, without leaving it where others would find it."""
    file = ROOT / "tools/warprnnt_pytorch/warprnnt_pytorch/__init__.py"
    spec = importlib.util.spec_from_file_location("warprnnt_pytorch", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def warprnnt():
    return load()


def environment(folder, *packages):
    """A new environment with this one's packages and those in some folders; a way to run in it.

    A folder named in a .pth file is searched for packages, but its own .pth files (an
    editable espnet_pl is one) are not read.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    paths = [sysconfig.get_paths()["purelib"], *map(str, packages)]
    (site / "others.pth").write_text("\n".join(paths) + "\n")

    def run(*command, cwd=folder, **variables):
        return subprocess.run(
            command,
            cwd=cwd,
            env={
                "PATH": f"{folder}/bin:/usr/bin:/bin",
                "VIRTUAL_ENV": str(folder),
                "OMP_NUM_THREADS": "1",
                **variables,
            },
            capture_output=True,
            text=True,
        )

    return run


def batch(dtype=torch.float64):
    """As warp-transducer wants it: int32, and nothing behind the longest."""
    return example(dtype, (3, 4, 4, 5)), LABELS.int(), FRAMES.int(), LENGTHS.int()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("fast_emit", [0.0, 0.5])
def test_equals_the_sum_over_all_alignments(warprnnt, reduction, fast_emit):
    acts, *rest = batch()
    expected = -dense(acts, FRAMES, LABELS, LENGTHS, fast_emit=fast_emit)
    if reduction != "none":
        expected = getattr(expected, reduction)(0, keepdim=True)
    loss = warprnnt.RNNTLoss(reduction=reduction, fastemit_lambda=fast_emit)(acts, *rest)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, warprnnt.rnnt_loss(acts, *rest, 0, reduction, fast_emit))
    upstream = torch.linspace(-1, 2, len(loss), dtype=torch.float64)
    gradients = [torch.autograd.grad(x, acts, upstream)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


def test_the_example_of_warp_transducer_has_its_value(warprnnt):
    acts = torch.full((1, 2, 3, 5), 0.1)
    acts[0, 0, 0, 1] = acts[0, 0, 1, 2] = acts[0, 1, 0, 1] = 0.6
    acts[0, 0, 2, 3], acts[0, 1, 2, 0] = 0.8, 0.7
    acts[0, 0, 2, 2] = acts[0, 1, 1, 2] = acts[0, 1, 2, 2] = 0.2
    lengths = torch.tensor([2], dtype=torch.int32)
    loss = warprnnt.RNNTLoss()(acts, torch.tensor([[1, 2]], dtype=torch.int32), lengths, lengths)
    assert loss.shape == (1,) and loss.item() == pytest.approx(4.495666, rel=1e-6)  # its test.py


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_any_blank_and_wider_labels(warprnnt, dtype):
    acts, labels, *lengths = batch(dtype)
    wider = torch.nn.functional.pad(labels, (0, 2), value=-1)
    loss = warprnnt.RNNTLoss(blank=4)(acts, wider, *lengths)
    expected = -dense(acts.double(), FRAMES, LABELS, LENGTHS, blank=4).mean()[None]
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, acts)[0].dtype == dtype


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x.detach().int(), TypeError, "acts must be floating"),
        (1, lambda x: x.long(), TypeError, r"labels must be torch.int32, .* labels.int\(\)"),
        (2, lambda x: x.float(), TypeError, "act_lens must be torch.int32"),
        (3, lambda x: x.short(), TypeError, "label_lens must be torch.int32"),
        (1, lambda x: x.t().contiguous().t(), ValueError, "labels must be contiguous"),
        (0, lambda x: x[0], ValueError, r"acts must be 4D, not \(4, 4, 5\)"),
        (1, lambda x: x.flatten(), ValueError, r"labels must be 2D, not \(9,\)"),
        (2, lambda x: x[:, None], ValueError, "act_lens must be 1D"),
        (2, lambda x: x[:2], ValueError, "act_lens must have a row per example: 3, not 2"),
        (3, lambda x: x[:2], ValueError, "label_lens must have a row per example: 3, not 2"),
        (2, lambda x: x - 1, ValueError, "Input length mismatch: acts has 4 frames, .* is 3"),
        (2, lambda x: x + 1, ValueError, "Input length mismatch: acts has 4 frames, .* is 5"),
        (3, lambda x: x - 1, ValueError, "Output length mismatch: .* is 2, acts has 4 states"),
        (1, lambda x: x[:, :2].contiguous(), ValueError, "labels has 2 columns, fewer than 3"),
        (1, lambda x: x * 0, ValueError, "the blank, 0, is among the labels"),
        (1, lambda x: x + 4, ValueError, "token 5, but the vocabulary has 5"),
    ],
)
def test_what_warp_transducer_refuses_is_refused(warprnnt, place, change, error, message):
    call = [*batch()]
    call[place] = change(call[place])
    with pytest.raises(error, match=message):
        warprnnt.rnnt_loss(*call)


def test_an_unknown_reduction_is_refused(warprnnt):
    with pytest.raises(ValueError, match="one of mean, sum, none, not 0.1"):
        warprnnt.RNNTLoss(0, 0.1)(*batch())  # copies differ in the order of these


def test_a_loss_that_is_off_is_not_made(warprnnt, monkeypatch):
    true = transducer.full_sum
    monkeypatch.setattr(transducer, "full_sum", lambda *a: 1.001 * true(*a))
    transducer.self_test.cache_clear()
    with pytest.raises(RuntimeError, match="nothing should be trained with it"):
        warprnnt.RNNTLoss()


def test_it_is_installed_once_and_removed(tmp_path):
    run = environment(tmp_path, ROOT)
    missing = run("python", "-c", VERSION)
    assert "No module named 'warprnnt_pytorch'" in missing.stderr
    for _ in range(2):
        done = run(INSTALL)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"warprnnt_pytorch 0.3+espnet_pl is in {tmp_path}\n"
        assert run("python", "-c", VERSION).stdout == "0.3+espnet_pl\n"
    shown = run("python", "-m", "pip", "show", "warprnnt_pytorch").stdout
    assert "Version: 0.3+espnet.pl" in shown and str(tmp_path) in shown
    for _ in range(2):
        gone = run(INSTALL, "--remove")
        assert gone.returncode == 0, gone.stderr
        assert gone.stdout == f"there is no warprnnt_pytorch in {tmp_path}\n"
        assert run("python", "-c", VERSION).returncode == 1


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("option", [[], ["--remove"]])
def test_another_one_is_left_alone(option, variable, tmp_path):
    theirs = tmp_path / "theirs/warprnnt_pytorch/__init__.py"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("from ._warp_rnnt import *\n")  # does not load, as many a build
    folder = str(tmp_path / "theirs")
    run = environment(tmp_path / "env", ROOT, *([] if variable else [folder]))
    refused = run(INSTALL, *option, **({"PYTHONPATH": folder} if variable else {}))
    assert refused.returncode == 1
    assert f"is left alone: {theirs}" in refused.stderr
    assert "pip uninstall warprnnt_pytorch" in refused.stderr
    assert theirs.is_file() and not [*tmp_path.glob("env/**/*warprnnt*")]


def test_an_environment_without_espnet_pl_is_refused(tmp_path):
    (tmp_path / "tools").mkdir()
    script = shutil.copy(INSTALL, tmp_path / "tools")  # beside it there is no environment
    refused = environment(tmp_path / "env")(script)
    assert refused.returncode == 1
    assert "espnet_pl is in no active environment" in refused.stderr
    assert f"pip install -e {tmp_path}" in refused.stderr


def test_what_does_not_work_is_not_passed_over(tmp_path):
    old = tmp_path / "old/espnet_pl/losses"
    old.mkdir(parents=True)
    (old / "__init__.py").touch()
    (old.parent / "__init__.py").touch()
    refused = environment(tmp_path / "env", tmp_path / "old")(INSTALL)
    assert refused.returncode == 1
    assert "No module named 'espnet_pl.losses.transducer'" in refused.stderr
    assert f"Its file: {old.parent}/__init__.py" in refused.stderr


def test_options():
    shown = subprocess.run([INSTALL, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--remove" in shown.stdout
    refused = subprocess.run([INSTALL, "--rmeove"], capture_output=True, text=True)
    assert refused.returncode == 1 and "unknown option --rmeove" in refused.stderr


def test_install_sh_never_installs_it():
    assert "warprnnt" not in (ROOT / "tools/install.sh").read_text()
    assert os.access(INSTALL, os.X_OK)
