"""One training at a time in a folder, also where a node that was given up on lives on.

A lock of the file system keeps a second process out; it ends with the process that holds it.  When
Slurm starts a job once more, because a node does not answer, the first copy may still run and hold
it: the new one takes over, and the old one finds, before it writes a checkpoint, that the folder is
no longer its own.
"""

import fcntl
import json
import os
import socket
import time
import uuid
from pathlib import Path

from espnet_pl.methods.base import ConfigError

NAME = ".owner"


class TakenOverError(RuntimeError):
    """Another process goes on with this training."""


class Owner:
    """The right to write in a folder.

    Args:
        folder: of the training.

    Raises:
        ConfigError: another training is under way there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.mine = {
            "token": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"), "job": os.environ.get("SLURM_JOB_ID"),
            "start": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = self._read()
            again = self.mine["job"] and other.get("job") == self.mine["job"]
            if not (again and other.get("start", 0) < self.mine["start"]):
                self.file.close()
                raise ConfigError(
                    f"{folder} is in use: process {other.get('process')} on {other.get('host')} "
                    f"trains there since {other.get('since')}; stop it, or let it finish"
                ) from None
        except OSError:
            pass  # a file system without locks: the token alone has to do
        self.file.seek(0)
        self.file.truncate()
        json.dump(self.mine, self.file)
        self.file.flush()

    def check(self) -> None:
        """Before anything is written.

        Raises:
            TakenOverError: the folder has another owner now.
        """
        other = self._read()
        if other.get("token") != self.mine["token"]:
            raise TakenOverError(
                f"{self.path.parent} was taken over by process {other.get('process')} on "
                f"{other.get('host')} at {other.get('since')}; this one ends without saving"
            )

    def leave(self) -> None:
        """The folder is free again."""
        self.file.close()

    def _read(self) -> dict:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
