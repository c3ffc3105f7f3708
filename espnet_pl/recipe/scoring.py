"""Hits, substitutions, deletions and insertions of text, by jiwer; sclite as a witness."""

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jiwer
import numpy as np

SCLITE = "/usr/lib/sctk/bin/sclite"  # where Debian puts it, outside PATH
COUNTS = ("hits", "substitutions", "deletions", "insertions")


def read_text(path: Path) -> dict[str, str]:
    """``id words`` lines; the words may be missing.

    Raises:
        ValueError: an id twice.
    """
    table: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            key, *words = line.split()
            if key in table:
                raise ValueError(f"{path}: the id {key!r} occurs twice")
            table[key] = " ".join(words)
    return table


def align(references: Sequence[str], hypotheses: Sequence[str], unit: str) -> np.ndarray:
    """Counts of every utterance, [n, 4] as in `COUNTS`.

    Args:
        references: what was said; where that is nothing, every unit recognised is an insertion.
        hypotheses: what was recognised, in the same order; may be empty.
        unit: ``word`` or ``character`` (a space is one, as in ESPnet).
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, {len(hypotheses)} hypotheses")
    process = {"word": jiwer.process_words, "character": jiwer.process_characters}[unit]
    counts = np.zeros((len(references), 4), dtype=np.int64)
    if not len(references):
        return counts
    aligned = process(list(references), list(hypotheses)).alignments
    column = {"equal": 0, "substitute": 1, "delete": 2, "insert": 3}
    for row, chunks in zip(counts, aligned, strict=True):
        for chunk in chunks:
            spans = chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx
            row[column[chunk.type]] += max(spans)
    return counts


def summary(counts: np.ndarray) -> dict[str, float]:
    """The figures of ESPnet's table, in per cent of the reference units."""
    hits, substitutions, deletions, insertions = counts.sum(axis=0).tolist()
    units = max(hits + substitutions + deletions, 1)
    wrong = int((counts[:, 1:].sum(axis=1) > 0).sum())
    return {
        "snt": len(counts),
        "wrd": hits + substitutions + deletions,
        "corr": 100 * hits / units,
        "sub": 100 * substitutions / units,
        "del": 100 * deletions / units,
        "ins": 100 * insertions / units,
        "err": 100 * (substitutions + deletions + insertions) / units,
        "s_err": 100 * wrong / max(len(counts), 1),
    }


def find_sclite() -> str | None:
    """The path of sclite, or None."""
    return shutil.which("sclite") or (SCLITE if Path(SCLITE).exists() else None)


def sclite(program: str, references: Mapping[str, str], hypotheses: Mapping[str, str]) -> list[int]:
    """NIST's own word counts: correct, substitutions, deletions, insertions."""
    with tempfile.TemporaryDirectory() as folder:
        for name, texts in (("ref", references), ("hyp", hypotheses)):
            lines = [f"{texts[key]} (s-{number})\n" for number, key in enumerate(references)]
            Path(folder, name).write_text("".join(lines), encoding="utf-8")
        argv = [program, "-s", "-i", "rm", "-e", "utf-8", "-o", "rsum", "stdout"]
        argv += ["-r", f"{folder}/ref", "trn", "-h", f"{folder}/hyp", "trn"]
        out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    total = next(line for line in out.splitlines() if line.split()[:2] == ["|", "Sum"])
    return [int(word) for word in total.split("|")[3].split()[:4]]
