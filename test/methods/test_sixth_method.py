"""Adding a method is one file, one yaml, one test: done here, in a copy of the project."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

METHOD = r'''
r"""Entropy minimisation: unlabelled frames should be certain.

Source: Grandvalet and Bengio, "Semi-supervised learning by entropy minimization", NIPS 2004.
Equation: L = L_sup + λ · (1/T) Σ_t H(p_t).
Differs from the paper: frames of a CTC network take the place of examples.
Cost: one training pass per unlabelled utterance.
"""

from dataclasses import dataclass

import torch

from espnet_pl.data.pairing import Pairing
from espnet_pl.methods import base


@dataclass(frozen=True)
class Config:
    """λ."""

    weight: float = 0.1


class Method(base.Method):
    """No teacher at all."""

    requires = frozenset({"frame_log_probs"})

    @classmethod
    def pairing(cls, config):
        return Pairing(unlabelled=1)

    def unlabelled(self, student, x):
        log_p, frames = student.hear(x).frame_log_probs()
        valid = torch.arange(log_p.shape[1]) < frames[:, None]
        entropy = -(log_p.exp() * log_p).sum(dim=-1)[valid].mean()
        return {"entropy": base.Term(entropy, self.config.weight, len(x))}
'''
YAML = "method: entropy\nmethod_conf: {weight: 0.3}\nrecipe: {init: supervised}\n"
TEST = '''
"""methods/entropy: the weight is λ."""

from espnet_pl.methods.registry import build
from test.toys import batch, speaking_student


def test_the_weight_is_lambda():
    student = speaking_student()
    assert build("entropy", {"weight": 0.5}, student)(student, batch())["entropy"].weight == 0.5
'''


def test_one_file_one_yaml_one_test(tmp_path):
    for folder in ("espnet_pl", "test", "egs"):
        ignored = shutil.ignore_patterns("__pycache__", "data", "dump", "exp", "log")
        if folder == "espnet_pl":
            ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "espnet_pl/methods/entropy.py").write_text(METHOD.lstrip())
    (tmp_path / "egs/mini_alnum/pl1/conf/entropy.yaml").write_text(YAML)
    (tmp_path / "test/methods/test_entropy.py").write_text(TEST.lstrip())

    def run(*argv):
        done = subprocess.run(
            [sys.executable, *argv], cwd=tmp_path, capture_output=True, text=True,
            env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return done.stdout + done.stderr

    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    report = run(
        *pytest, "test/methods/test_entropy.py", "test/methods/test_contract.py", "-k", "entropy"
    )
    assert " passed" in report and "failed" not in report and "error" not in report, report
    assert int(report.split(" passed")[0].split()[-1]) >= 12, report

    check = (
        "from espnet_pl.bridge.train import load_config, needs_unlabelled;"
        "conf = 'egs/mini_alnum/pl1/conf/';"
        "c = load_config([conf + 'asr.yaml', conf + 'entropy.yaml']);"
        "print(c['method'], needs_unlabelled(c))"
    )
    assert "entropy True" in run("-c", check)
