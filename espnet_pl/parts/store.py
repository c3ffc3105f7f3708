"""What a teacher said of each utterance, on disk: made once, read in every epoch of every run.

A folder holds one SQLite file per shard, ``records.<i>of<n>.sqlite``: an utterance is there as a
whole or not at all, whenever the writer was killed.  A row is safetensors' file, compressed by
zlib, with a checksum; beside the rows stands, in JSON, what the records are of.  Nothing is read
before it is asked for.
"""

import contextlib
import json
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load, save

from espnet_pl.parts.cache import Record

FORMAT = 2
TABLES = (
    "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE IF NOT EXISTS records (utt_id TEXT PRIMARY KEY, payload BLOB, checksum INTEGER)",
    "CREATE TABLE IF NOT EXISTS finished (records INTEGER)",
)
NOTHING: Mapping[str, Any] = MappingProxyType({})


class StoreError(ValueError):
    """Records that cannot be used: says which, why, and what to do."""


class Writer:
    """Writes one shard.  What is committed stays, and a later writer goes on from there.

    Args:
        shard: of ``shards``, counted from 1.
        meta: what the records are of, in JSON.

    Raises:
        StoreError: the shard is of something else, damaged, or being written by another process.
    """

    def __init__(
        self, folder: str | Path, shard: int = 1, shards: int = 1, meta: Mapping = NOTHING
    ) -> None:
        if not 1 <= shard <= shards:
            raise StoreError(f"shard {shard} of {shards}: they are counted from 1 to {shards}")
        self.path = Path(folder) / f"records.{shard}of{shards}.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _told(self.path), contextlib.ExitStack() as failed:
            self._db = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
            failed.callback(self._db.close)
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # no second writer, until closed
            self._db.execute("BEGIN EXCLUSIVE")
            for table in TABLES:
                self._db.execute(table)
            own, there = _json({**meta, "format": FORMAT}), _meta(self._db)
            if there:
                same(self.path, there, own)
            for key in {} if there else own:
                self._db.execute("INSERT INTO meta VALUES (?, ?)", (key, json.dumps(own[key])))
            self.done = {utt_id for (utt_id,) in self._db.execute("SELECT utt_id FROM records")}
            failed.pop_all()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        # After an error too: each record is whole.
        with contextlib.closing(self._db):
            self._db.execute("COMMIT")

    def put(self, utt_id: str, record: Record) -> None:
        """Keep what was said of an utterance; an older record of it is replaced."""
        payload = _packed(record)
        row = (utt_id, payload, _checksum(utt_id, payload))
        with _told(self.path):
            self._db.execute("DELETE FROM finished")
            self._db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", row)
        self.done.add(utt_id)

    def commit(self) -> None:
        """Nothing that was put before is lost after this."""
        with _told(self.path):
            self._db.execute("COMMIT")
            self._db.execute("BEGIN EXCLUSIVE")

    def finish(self) -> None:
        """The shard is complete."""
        with _told(self.path):
            self._db.execute("DELETE FROM finished")
            self._db.execute("INSERT INTO finished VALUES (?)", (len(self.done),))
        self.commit()


class Reader:
    """Records by utterance id; the folder may be read-only.

    Args:
        expected: what the records must be of; of ``meta`` nothing else is compared.

    Raises:
        StoreError: there are none, some are missing, or they are of something else.
    """

    def __init__(self, folder: str | Path, expected: Mapping = NOTHING) -> None:
        self.folder = Path(folder)
        self._shards: list[tuple[Path, sqlite3.Connection]] = []
        self._count, self.meta = 0, {}
        for path in _shards(self.folder):
            with _told(path):
                # Immutable: SQLite then needs no lock, which a read-only folder would refuse.
                uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
                db = sqlite3.connect(uri, uri=True)
                self._shards.append((path, db))
                self._count += _complete(path, db)
                meta = _meta(db)
            expected = _json({**expected, "format": FORMAT})
            same(path, {key: meta.get(key) for key in expected}, expected)
            self.meta = self.meta or meta
            same(path, meta, self.meta)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, utt_id: str) -> bool:
        return self._row("1", utt_id) is not None

    def missing(self, utt_ids: Iterable[str]) -> list[str]:
        """Those without a record, in their order."""
        return [utt_id for utt_id in utt_ids if utt_id not in self]

    def get(self, utt_id: str) -> Record:
        """What was said of an utterance.

        Raises:
            KeyError: nothing was.
            StoreError: the record is damaged.
        """
        found = self._row("payload, checksum", utt_id)
        if found is None:
            raise KeyError(
                f"no record of utterance {utt_id!r} among the {len(self)} in {self.folder}: "
                "it was made of other speech; make one of this"
            )
        path, (payload, checksum) = found
        if not isinstance(payload, bytes) or _checksum(utt_id, payload) != checksum:
            raise StoreError(
                f"{path}: the record of utterance {utt_id!r} is damaged; {_again(path)}"
            )
        return _unpacked(payload)

    def _row(self, columns: str, utt_id: str) -> tuple[Path, tuple] | None:
        for path, db in self._shards:
            with _told(path):
                query = f"SELECT {columns} FROM records WHERE utt_id = ?"
                row = db.execute(query, (utt_id,)).fetchone()
            if row:
                return path, row
        return None


def _shards(folder: Path) -> list[Path]:
    """All shards there should be."""
    names = [path.name for path in folder.glob("records.*")]
    found = [m for m in (re.fullmatch(r"records\.(\d+)of(\d+)\.sqlite", n) for n in names) if m]
    if not found:
        raise StoreError(f"{folder}: no records here")
    divisions = sorted({int(m[2]) for m in found})
    if len(divisions) > 1:
        raise StoreError(
            f"{folder}: shards of several divisions, {' and '.join(map(str, divisions))}; "
            "remove all but those of one"
        )
    files = [folder / f"records.{k + 1}of{divisions[0]}.sqlite" for k in range(divisions[0])]
    lost = [path.name for path in files if not path.exists()]
    if lost:
        raise StoreError(f"{folder}: {', '.join(lost)} not there; run the commands of these shards")
    return files


def _complete(path: Path, db: sqlite3.Connection) -> int:
    """How many records there are, if these are all."""
    (count,) = db.execute("SELECT COUNT(*) FROM records").fetchone()
    finished = db.execute("SELECT records FROM finished").fetchone()
    if finished is None:
        raise StoreError(
            f"{path}: not finished, {count} utterances are there; the command that was writing "
            "it goes on from there when it is run again"
        )
    if finished != (count,):
        raise sqlite3.DatabaseError(f"{count} records of {finished[0]}")
    return count


def _meta(db: sqlite3.Connection) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM meta")}


def same(path: Path, there: Mapping, wanted: Mapping) -> None:
    """Refuses a file that is of something else.

    Raises:
        StoreError: names what differs, and both values.
    """
    if found := list(_differences(dict(there), dict(wanted))):
        raise StoreError(
            f"{path}: made of something else: {'; '.join(found[:5])}. Give another folder, or "
            f"remove {path.parent} and make it anew"
        )


def _differences(there: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """What differs, by name, and both values."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in sorted({*there, *wanted}):
            yield from _differences(there.get(key), wanted.get(key), f"{name}.{key}".strip("."))
    elif there != wanted and isinstance(there, list) and isinstance(wanted, list):
        if len(there) != len(wanted):
            yield f"{name} has {len(there)} entries there, {len(wanted)} are wanted"
            return
        place = next(i for i, pair in enumerate(zip(there, wanted)) if pair[0] != pair[1])
        yield from _differences(there[place], wanted[place], f"{name}[{place}]")
    elif there != wanted:
        yield f"{name} is {there!r:.80} there, {wanted!r:.80} is wanted"


def _json(meta: Mapping) -> dict[str, Any]:
    """As it is read back: a tuple is a list then."""
    return json.loads(json.dumps(dict(meta)))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What SQLite complains about, in words that help."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreError(f"{path}: another process is writing it; wait for it") from None
        raise StoreError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        if path.with_name(f"{path.name}-journal").exists():
            raise StoreError(
                f"{path}: not finished, its writer is at work or was killed; the command that was "
                "writing it goes on from there when it is run again"
            ) from None
        raise StoreError(f"{path} is damaged ({error}); {_again(path)}") from error


def _again(path: Path) -> str:
    return "remove this file, and run the command again that made it"


def _checksum(utt_id: str, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(utt_id.encode()))


def _packed(record: Record) -> bytes:
    # As copies: safetensors takes no two tensors that share their memory.
    alone = {name: x.detach().cpu().clone().contiguous() for name, x in record.items()}
    return zlib.compress(save(alone), level=3)


def _unpacked(payload: bytes) -> Record:
    return load(zlib.decompress(payload))
