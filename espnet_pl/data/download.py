"""Where a corpus comes from: the user's folder, a shared folder, or a checked download."""

import hashlib
import http.client
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def find_corpus(name: str, marker: Callable[[Path], bool], fetch: Callable[[], Path]) -> Path:
    """The folder that holds the corpus.

    Looked for in the environment: ``NAME`` (a folder, or ``downloads`` to fetch it), then
    ``ESPNET_PL_SHARED`` (a folder with ``data/name``).

    Args:
        marker: tells whether a folder holds the corpus in a layout that is understood.
        fetch: downloads it and returns the folder.

    Raises:
        SystemExit: nothing is set, or what is set does not hold the corpus; says what to do.
    """
    key, shared = name.upper(), os.environ.get("ESPNET_PL_SHARED")
    given = os.environ.get(key)
    if given == "downloads":
        return fetch()
    if not given and shared:
        given = os.path.join(shared, "data", name)
    if not given:
        raise SystemExit(
            f"{name}: no corpus given. Set {key}=<folder> in db.sh or the environment, "
            f"or {key}=downloads to fetch it."
        )
    if not marker(Path(given)):
        raise SystemExit(
            f"{name}: {given} does not hold the corpus in a known layout (see README.md)"
        )
    return Path(given)


def download(url: str, target: Path, timeout: float = 60.0) -> None:
    """Fetches ``url``; ``target`` appears complete or not at all.

    Raises:
        SystemExit: no network, an HTTP error, a stall of ``timeout`` seconds, a cut transfer.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        print(f"downloading {url}", flush=True)
        with urllib.request.urlopen(url, timeout=timeout) as reply, open(temporary, "wb") as file:
            while block := reply.read(1 << 20):
                file.write(block)
            # read(n) returns what there is when the other side hangs up early.
            expected = reply.headers.get("Content-Length")
            if expected and file.tell() != int(expected):
                raise OSError(f"{file.tell()} of {expected} bytes arrived")
        os.replace(temporary, target)
    except (OSError, http.client.HTTPException, urllib.error.URLError, ValueError) as error:
        raise SystemExit(
            f"{url}: {error}. Without a network, fetch it elsewhere and give its folder instead."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def unpack(archive: Path, folder: Path, wanted: Callable[[str], str | None]) -> int:
    """Extracts the plain files of a tar archive for which ``wanted`` gives a relative name.

    Nothing else leaves the archive: no links, no devices, no name outside ``folder``.

    Returns:
        The number of files.

    Raises:
        SystemExit: not a readable archive.
    """
    count, root = 0, folder.resolve()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = wanted(member.name) if member.isfile() else None
                path = (root / name).resolve() if name else root
                if not name or not path.is_relative_to(root):
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
                count += 1
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SystemExit(f"{archive} is damaged ({error}); delete it and run again") from error
    return count


def pcm_digest(recordings: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and 16-bit samples [n], in order of name, whatever the file format.

    An archive's own checksum changes when its host packs it again; the samples do not.
    """
    digest = hashlib.sha256()
    for name in sorted(recordings):
        samples = np.ascontiguousarray(recordings[name], dtype="<i2")
        digest.update(f"{name} {len(samples)}\n".encode())
        digest.update(samples.tobytes())
    return digest.hexdigest()
