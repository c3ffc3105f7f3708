"""A large test set is recognised in parts: cuts its list, and joins what was recognised.

Usage: ``parts split LIST N FOLDER`` writes FOLDER/keys.1 ... keys.N; ``parts join LIST FOLDER
PART...`` writes text, token, token_int and score to FOLDER, sorted, one line per key of LIST.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

FILES = ("text", "token", "token_int", "score")


def keys(path: Path) -> list[str]:
    """The first word of every line."""
    return [line.split(maxsplit=1)[0] for line in _lines(path)]


def split(source: Path, n: int, folder: Path) -> None:
    """Cuts a list into ``n`` lists whose lengths differ by one at most."""
    lines = _lines(source)
    for part in range(n):
        own = lines[len(lines) * part // n : len(lines) * (part + 1) // n]
        _write(folder / f"keys.{part + 1}", own)


def join(source: Path, folder: Path, parts: Sequence[Path]) -> None:
    """Joins stock inference's ``1best_recog`` folders.

    Raises:
        SystemExit: an utterance without hypothesis, with two, or that was not asked for.
    """
    wanted = keys(source)
    for name in FILES:
        found = [line for part in parts for line in _lines(part / name)]
        got = [line.split(maxsplit=1)[0] for line in found]
        if sorted(got) != sorted(wanted):
            odd = sorted(set(wanted) ^ set(got)) or [key for key in got if got.count(key) > 1]
            raise SystemExit(
                f"{folder}/{name}: {len(got)} hypotheses for {len(wanted)} utterances; "
                f"first that differ: {' '.join(odd[:5])}"
            )
        _write(folder / name, sorted(found, key=lambda line: line.split(maxsplit=1)[0]))


def _lines(path: Path) -> list[str]:
    # Not splitlines(): a transcript may hold characters that it takes for line ends.
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _write(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    if sys.argv[1] == "split":
        split(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        join(Path(sys.argv[2]), Path(sys.argv[3]), [Path(part) for part in sys.argv[4:]])
