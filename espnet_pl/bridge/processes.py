"""Several processes of this machine train together, as the ranks of one job.

ESPnet starts a process for each of several GPUs itself.  On CPUs it is done here, by the command
that ``srun`` or ``torchrun`` would start on several machines.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from torch.multiprocessing import _prctl_pr_set_pdeathsig  # does nothing but on Linux

from espnet_pl.methods.base import ConfigError
from espnet_pl.parts.signals import AGAIN, SIGNALS

POLL = 0.2  # seconds between two looks at the ranks
GRACE = 60.0  # seconds that the others have to end, once one has failed


def run(count: int, ngpu: int, argv: Sequence[str]) -> None:
    """Train with the options of ``espnet_pl.bridge.train`` in so many processes.

    Raises:
        ConfigError: GPUs are asked for, too.
        SystemExit: one has failed, with its status; it has said why, and the others have ended.
    """
    if ngpu:
        raise ConfigError(
            f"num_processes is {count}: they are of CPUs; on GPUs, --ngpu {count} starts as many"
        )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "espnet_pl.bridge.train", *argv, "--num_processes", "1"]
        command += ["--multiprocessing_distributed", "false", "--dist_world_size", str(count)]
        command += ["--dist_init_method", f"file://{folder}/rendezvous", "--dist_rank"]
        ranks = [_start([*command, str(rank)]) for rank in range(count)]
        heard: list[int] = []

        def pass_on(number: int, _: object) -> None:  # they may have something to save
            heard.append(number)
            _tell(ranks, number)

        wanted = (*SIGNALS, signal.SIGINT)
        before = {number: signal.signal(number, pass_on) for number in wanted}
        try:
            failed = _wait(ranks, heard)
        finally:
            _tell(ranks, signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)
    if failed is not None:
        status = ranks[failed].returncode
        if status == AGAIN:  # told to stop, all have
            raise SystemExit(AGAIN)
        how = f"ended with status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            how += " (out of memory?)" if -status == signal.SIGKILL else ""
        print(f"error: rank {failed} of {count} {how}, and then the others", file=sys.stderr)
        raise SystemExit(status if status > 0 else 128 - status)


def _start(command: Sequence[str]) -> subprocess.Popen:
    """A rank.  It hears signals from here only, so once, and does not outlive this process."""
    return subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: _prctl_pr_set_pdeathsig(signal.SIGKILL),
    )


def _wait(ranks: Sequence[subprocess.Popen], heard: Sequence[int] = ()) -> int | None:
    """Until all have ended; the first that failed.

    Args:
        heard: signals that they have been told of.
    """
    failed, end = None, float("inf")
    while True:
        statuses = [rank.poll() for rank in ranks]
        if failed is None and any(statuses):
            # Of several, one that was killed: others fail because it has gone.
            failed = min((status, rank) for rank, status in enumerate(statuses) if status)[1]
            end = time.monotonic() + GRACE
            if not heard:  # or they may be saving something
                _tell(ranks, signal.SIGTERM)
        if None not in statuses:
            return failed
        if time.monotonic() > end:
            _tell(ranks, signal.SIGKILL)
        time.sleep(POLL)


def _tell(ranks: Sequence[subprocess.Popen], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)  # to one that has ended, nothing happens
