"""What is kept of a finished cell of a study: small enough for the repository.

Usage: ``python3 -m espnet_pl.recipe.record FOLDER CONF --sets dev --seed 1 --output FILE``; and
``--before FOLDER`` for each earlier phase.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from espnet_pl.recipe import config, markers, measure


def record(
    folder: Path, conf: Path, sets: Sequence[str], seed: int, before: Sequence[Path] = ()
) -> dict[str, Any]:
    """What is kept of a finished cell.

    Args:
        before: the folders of its earlier phases; updates and time are of all of them together.
    """
    every = [*before, folder]
    made = [markers.read(own / "train.job.json") or {} for own in every]
    logs = [(own / "train.log").read_text(encoding="utf-8", errors="replace") for own in every]
    updates = [measure.updates(own) for own in every]
    spent = {key: _sum(marker.get(key) for marker in made) for key in ("wall_s", "cpu_s")}
    errors, drawn = {}, {}
    for test in sets:
        reference = measure.read_reference(test, [test])
        drawn[test] = reference.clusters.tolist() if reference.drawn == "speakers" else None
        counts = measure.score(reference, {seed: folder}, [test])["word"][seed]
        keys = (key.removeprefix(f"{test}/") for key in reference.texts)
        errors[test] = dict(zip(keys, counts.tolist()))
    return {
        "corpus": Path.cwd().parent.name,
        "cell": conf.stem,
        "seed": seed,
        "settings": config.mapping(conf),
        "errors": errors,  # of each utterance: correct, substituted, deleted, inserted words
        "speakers": drawn,  # a number for each utterance, where there are enough of them
        "curves": curves(*logs),
        "alarms": alarms(logs, updates),
        "updates": _sum(updates),
        **spent,
        **{key: made[-1].get(key) for key in ("finished", "environment", "shell")},
    }


def _sum(values: Iterable[float | None]) -> float | None:
    """Nothing, if one is not known."""
    values = list(values)
    return None if None in values else sum(values)


def alarms(logs: Sequence[str], updates: Sequence[int | None]) -> list[int]:
    """The updates at which the monitor saw a collapse, counted over phases."""
    found, before = [], 0
    for log, made in zip(logs, updates):
        found += [before + int(k) for k in re.findall(r"collapse at update (\d+)", log)]
        before += made or 0
    return found


def curves(*logs: str) -> dict[str, dict[str, list]]:
    """What ESPnet logged: of training every so many updates, of dev every epoch.

    Args:
        logs: of trainings one after the other, whose updates are counted on.

    Returns:
        For ``train`` and ``valid`` the values of each name as pairs (update, value).
    """
    out: dict[str, dict[str, list]] = {"train": {}, "valid": {}}
    before = 0  # updates of earlier epochs
    for log in logs:
        begin = before
        for line in log.splitlines():
            if found := re.search(r"(\d+)epoch:train:(\d+)-(\d+)batch: (.*)", line):
                update, text = before + int(found[3]), found[4]
                _add(out["train"], update, text)
            elif found := re.search(
                r"epoch results: \[train\] (.*?)total_count=(\d+), \[valid\] (.*)", line
            ):
                before = begin + int(found[2])
                _add(out["valid"], before, found[3])
    return out


def _add(curves: dict[str, list], update: int, text: str) -> None:
    for name, value in re.findall(r"(\w+)=(-?[\d.]+(?:e[+-]?\d+)?|nan)", text):
        if not re.search(r"time|optim|loss_scale|total_count|clip", name):
            # JSON has no NaN.
            curves.setdefault(name, []).append([update, None if value == "nan" else float(value)])


def main() -> None:
    """Writes the record of one finished cell."""
    parser = argparse.ArgumentParser(description="Keep the record of a finished cell.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("conf", type=Path)
    parser.add_argument("--sets", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--before", action="append", type=Path, default=[], help="earlier phases")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    kept = record(args.folder, args.conf, args.sets.split(","), args.seed, args.before)
    markers.write(args.output, kept)


if __name__ == "__main__":
    main()
