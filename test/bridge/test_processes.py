"""bridge/processes: ranks that are started here, and how they end."""

import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from espnet_pl.bridge import processes
from espnet_pl.bridge.batches import PairedIterFactory
from espnet_pl.bridge.train import ConfigError, main
from espnet_pl.data.pairing import Pairing
from test.bridge.test_distributed import Stream
from test.bridge.test_train import weights


def test_processes_of_this_machine_train_together(arguments, tmp_path):
    main([*arguments("mpl", max_epoch=1), "--num_processes", "2"])
    assert weights(tmp_path / "exp/checkpoint.pth")["optimizers"][0]["method"]["step"] == 5
    written = yaml.safe_load((tmp_path / "exp/config.yaml").read_text())
    assert written["dist_world_size"] == 2 and written["dist_backend"] == "gloo"
    assert not [*(tmp_path / "exp").glob(".train*")]


def test_gpus_have_a_process_each_already(arguments):
    with pytest.raises(ConfigError, match="on GPUs, --ngpu 3 starts as many"):
        main([*arguments("mpl"), "--num_processes", "3", "--ngpu", "3"])


def started(*programs):
    return [subprocess.Popen([sys.executable, "-c", program]) for program in programs]


def test_when_one_has_failed_the_others_end():
    ranks = started("import time; time.sleep(100)", "raise SystemExit(7)")
    began = time.monotonic()
    assert processes._wait(ranks) == 1
    assert time.monotonic() - began < 50
    assert [rank.returncode for rank in ranks] == [-signal.SIGTERM, 7]


def test_who_does_not_end_is_made_to(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.5)
    deaf = "import signal, time; signal.signal(15, lambda *_: print()); time.sleep(100)"
    ranks = started(deaf, "import time; time.sleep(3); raise SystemExit(7)")
    assert processes._wait(ranks) == 1
    assert ranks[0].returncode == -signal.SIGKILL


def test_it_is_said_which_has_failed(monkeypatch, capfd):
    start = processes._start
    code = "import os, sys; sys.exit(0) if sys.argv[-1] == '0' else os.kill(os.getpid(), 9)"
    program = [sys.executable, "-c", code]
    monkeypatch.setattr(processes, "_start", lambda command: start([*program, command[-1]]))
    with pytest.raises(SystemExit) as ended:
        processes.run(2, 0, [])
    assert ended.value.code == 137
    assert "error: rank 1 of 2 was killed by SIGKILL (out of memory?)" in capfd.readouterr().err


def test_ranks_hear_of_signals_and_decide(monkeypatch, tmp_path):
    """Those of a training; here they are programs that say goodbye."""
    code = "import signal, sys, time; from pathlib import Path\n"
    code += "said = Path(sys.argv[-1])\n"
    code += "signal.signal(15, lambda *_: (said.write_text('saved'), sys.exit(3)))\n"
    code += "Path(f'{said}.there').touch(); time.sleep(100)"
    start = processes._start

    def program(command):
        return start([sys.executable, "-c", code, str(tmp_path / command[-1])])

    monkeypatch.setattr(processes, "_start", program)

    def tell():
        while len([*tmp_path.glob("*.there")]) < 2:
            time.sleep(0.1)
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=tell).start()
    with pytest.raises(SystemExit) as ended:
        processes.run(2, 0, [])
    assert ended.value.code == 3
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["saved", "saved"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_ranks_with_different_numbers_of_batches_are_refused(monkeypatch):
    batches = Stream([["a"], ["b"]])
    other = {"labelled": 3, "unlabelled": 2, "fresh": 2, "gone": 2}
    monkeypatch.setattr("espnet_pl.bridge.batches.gather", lambda mine: [mine, other])
    with pytest.raises(ConfigError, match="different numbers of batches.*'labelled': 3"):
        PairedIterFactory(Pairing(unlabelled=1), batches, batches, 5, seed=0)
