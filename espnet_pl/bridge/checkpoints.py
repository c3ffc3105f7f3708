"""Checkpoint files that survive what happens to files.

A file is written beside its place, flushed to the disk, and then takes its place in one step, so a
process that is killed, or a full disk, leaves what was there.  A checkpoint of a run also keeps the
one before, as ``checkpoint.previous.pth``, and ends with a digest of its content: a file that was
cut short or changed is known, and the one before is taken.

The digest is the comment of the zip archive that ``torch.save`` writes, so ``torch.load`` reads the
file as it is.  It is read with ``weights_only``: a checkpoint holds tensors and plain values.
"""

import copy
import datetime
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from espnet_pl.methods.base import ConfigError

MARK = b"espnet_pl sha256 "
NAME = "checkpoint.pth"  # as stock ESPnet calls it
_SECONDS = "seconds of a timedelta"


class DamagedError(Exception):
    """A checkpoint is not what was written."""


def previous(path: Path) -> Path:
    """Where the checkpoint before is."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write(states: Mapping[str, Any], path: Path) -> None:
    """A checkpoint in the place of the last one, which becomes the previous one.

    Raises:
        OSError: it could not be written; what was there is untouched.
    """

    def fill(target: Path) -> None:
        _save(_plain(states), target)
        with open(target, "r+b") as file:
            digest = MARK + _digest(file, 2)
            file.seek(-2, os.SEEK_END)  # of an archive without comment: its length, 0
            file.write(len(digest).to_bytes(2, "little") + digest)

    replace(path, fill, keep=previous(path))


def read(path: Path, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint, if it is whole.

    Raises:
        DamagedError: it is not, or `write` did not make it.
    """
    verify(path)
    return _lively(torch.load(path, map_location=device, weights_only=True))


def verify(path: Path) -> None:
    """Whether a file is as it was written, without loading it.

    Raises:
        DamagedError: it is not, or `write` did not make it.
    """
    length = len(MARK) + 64
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - length - 2, 0))
        end = file.read()
        if end[:2] != length.to_bytes(2, "little") or not end[2:].startswith(MARK):
            raise DamagedError(f"{path} ({size} bytes) does not end as a checkpoint of ours does")
        if _digest(file, length + 2) != end[2 + len(MARK) :]:
            raise DamagedError(f"{path} ({size} bytes) has changed since it was written")


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder; None: there never was one.

    A damaged one is put aside as ``checkpoint.damaged.pth``, with a warning.

    Raises:
        ConfigError: there are some, and none is whole.
    """
    path = folder / NAME
    found = [file for file in (path, previous(path)) if file.exists()]
    faults = []
    for file in found:
        try:
            verify(file)
        except DamagedError as error:
            faults.append(str(error))
            continue
        if faults:
            logging.warning(f"{faults[0]}: the training goes on from {file}, the one before")
            if path.exists():
                path.replace(path.with_name("checkpoint.damaged.pth"))
        if file != path:
            os.replace(file, path)
        return path
    if faults:
        raise ConfigError(
            f"no checkpoint is whole: {'; '.join(faults)}. Bring one back from a copy, or start "
            f"anew in another folder (with --init_param from an epoch's model in {folder}, if one "
            "is there)"
        )
    return None


def put_aside(folder: Path) -> None:
    """Make room for a run that begins anew: it must not fall back to another one's checkpoint."""
    path = folder / NAME
    previous(path).unlink(missing_ok=True)
    if path.exists():
        logging.warning(f"{path} is of an earlier run; it is now checkpoint.old.pth")
        path.replace(path.with_name("checkpoint.old.pth"))


def replace(path: Path, fill: Callable[[Path], None], keep: Path | None = None) -> None:
    """A file in place of another one, at once and for good.

    Args:
        fill: writes the file it is given.
        keep: the name under which the old one stays.

    Raises:
        OSError: it could not be written; what was there is untouched.
    """
    new = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        fill(new)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _link(path, keep)
        os.replace(new, path)
        _sync(path.parent)
    except Exception as error:
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        kept = "; what was there before is kept" if path.exists() else ""
        raise OSError(
            f"cannot write {path}: {error} ({free >> 20} MiB are free there){kept}. Make room and "
            "run the same command again"
        ) from error
    finally:
        new.unlink(missing_ok=True)


def content(tensor: Tensor) -> str:
    """A digest of type, shape and numbers."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {[*tensor.shape]}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tidy(folder: Path) -> None:
    """Remove what killed processes have left half written."""
    for left in folder.glob(".*.pth.*"):
        left.unlink(missing_ok=True)


@contextmanager
def saving(
    folder: Path, checkpoint: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[None]:
    """Inside, what ESPnet saves in a folder is replaced at once, never written over.

    Its trainer calls ``torch.save`` with the name of the file, and has no seam there.

    Args:
        checkpoint: is given what ESPnet would write to ``checkpoint.pth``, in place of the file.
    """

    def save(states: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(file, (str, Path)) or Path(file).parent != folder:
            _save(states, file, *args, **kwargs)
        elif checkpoint and Path(file).name == NAME:
            checkpoint(states)
        else:
            replace(Path(file), lambda new: _save(states, new, *args, **kwargs))

    torch.save = save
    try:
        yield
    finally:
        torch.save = _save


_save = torch.save


def _digest(file: BinaryIO, cut: int) -> bytes:
    """Of a file without so many of its last bytes."""
    left, digest = file.seek(0, os.SEEK_END) - cut, hashlib.sha256()
    file.seek(0)
    while piece := file.read(min(max(left, 0), 1 << 20)):
        left -= len(piece)
        digest.update(piece)
    return digest.hexdigest().encode()


def _link(path: Path, name: Path) -> None:
    """A second name for a file, in place of what had it; where links are not known, it moves."""
    new = name.with_name(f".{name.name}.{socket.gethostname()}-{os.getpid()}")
    new.unlink(missing_ok=True)
    try:
        os.link(path, new)
        os.replace(new, name)
    except OSError:
        os.replace(path, name)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value: Any) -> Any:
    """What ``weights_only`` reads, of what ESPnet's reporter holds."""
    if isinstance(value, dict):
        return _each(_plain, value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, datetime.timedelta):
        return {_SECONDS: value.total_seconds()}
    return value


def _lively(value: Any) -> Any:
    """The inverse of `_plain`, where it matters."""
    if isinstance(value, dict):
        if value.keys() == {_SECONDS}:
            return datetime.timedelta(seconds=value[_SECONDS])
        return _each(_lively, value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_lively, value))
    return value


def _each(change: Callable[[Any], Any], values: dict) -> dict:
    """A mapping with changed values; a state has attributes beside them, which stay."""
    values = copy.copy(values)
    for name, value in values.items():
        values[name] = change(value)
    return values
