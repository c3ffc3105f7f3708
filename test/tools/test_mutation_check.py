"""tools/mutation_check.py: each planted fault has a place, and tests to be found by."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("check", ROOT / "tools/mutation_check.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)


@pytest.mark.parametrize("fault", check.FAULTS.values(), ids=check.FAULTS.keys())
def test_the_fault_can_be_planted(fault):
    assert fault.good in (ROOT / fault.file).read_text(encoding="utf-8")
    assert fault.good != fault.bad
    assert all((ROOT / word).exists() for word in fault.tests.split() if word.startswith("test/"))
