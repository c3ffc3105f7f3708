#!/usr/bin/env python3
"""Fill tables of README.md and docs/methods.md from the recipes' RESULTS.md.

A block of a page is written anew between its lines,

    <!-- results fsdd: test -->                              one recipe: its runs, on a test set
    <!-- rates fsdd test, an4 test+test_ext: slimipl lpm --> several: error rates of these runs
    <!-- end -->

everything else is left as it is.  Runs of a recipe's other model, which has a baseline and an
oracle of its own, follow those of the first.  Updates and processor time of a run's phases are
summed; the time is in times that of its model's baseline.

Usage: tools/results_page.py [PAGE]...
"""

import argparse
import math
import re
from pathlib import Path

from espnet_pl.recipe import config, report

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/methods.md")
BLOCK = re.compile(r"(<!-- (results|rates) ([^:]+): (.+?) -->\n).*?(<!-- end -->)", re.S)
HEAD = ("run", "WER %", "points, 95 % interval", "recovered %", "updates", "processor time")
OTHER = "\n## Students of another model"
TRANSDUCERS = "a transducer"


def read(text: str) -> list[dict[str, list[dict[str, str]]]]:
    """The tables of a RESULTS.md by their headings, as rows by column: of each model."""
    text = text.split("\n## Details")[0]
    out = []
    for part in text.split(OTHER):
        tables: dict[str, list[dict[str, str]]] = {}
        for title, body in re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", part, re.S | re.M):
            lines = [line[1:-1].split("|") for line in body.splitlines() if line[:1] == "|"]
            tables[title] = [dict(zip(lines[0], line)) for line in lines[2:]]
        out.append(tables)
    return out


def rates(tables: dict[str, list[dict[str, str]]], test: str) -> dict[str, str]:
    """Word error rates in per cent by run, as they are written."""
    rows = [row for row in tables["Word error rate"] if row["set"] == test]
    column = next(name for name in tables["Word error rate"][0] if name.startswith("WER %"))
    return {row["run"]: row[column].strip("*") for row in rows}


def costs(tables: dict[str, list[dict[str, str]]], run: str) -> tuple[int | str, float]:
    """Updates and seconds of a processor, of all phases; ? and NaN where one is not known."""
    rows = [row for row in tables["Training"] if row["run"].split(".")[0] == run]
    if any("?" in (row["updates"], row["CPU time"]) for row in rows):
        return "?", math.nan
    return sum(int(row["updates"]) for row in rows), sum(seconds(row["CPU time"]) for row in rows)


def seconds(duration: str) -> float:
    """Of '1 h 02 min', '2 min 05 s', '0.7 s'."""
    units = {"h": 3600, "min": 60, "s": 1}
    found = re.findall(r"([\d.]+) (h|min|s)", duration)
    return sum(float(count) * units[unit] for count, unit in found)


def results(recipe: str, test: str, egs: Path) -> str:
    """The table of one recipe: every run, and how it differs from its model's baseline."""
    baseline = config.load_recipe(egs / recipe / "pl1/recipe.yaml").baseline
    rows: list[tuple] = []
    for number, tables in enumerate(of(recipe, egs)):
        against = {row["run"]: row for row in tables[f"Against {baseline}"] if row["set"] == test}
        once = costs(tables, baseline)[1]
        if number:
            rows.append((TRANSDUCERS, *("",) * (len(HEAD) - 1)))
        for run, rate in rates(tables, test).items():
            points = recovered = ""
            if found := against.get(run):
                points = f"{found['WER points']} {found['95 % interval']} {found['verdict']}"
                recovered = found["recovered %"]
            updates, time = costs(tables, run)
            times = "?" if math.isnan(time / once) else f"{time / once:.2f}"
            rows.append((f"`{run}`", f"**{rate}**", points, recovered, updates, times))
    return "\n".join([*report.table(HEAD, rows), ""])


def several(recipes: str, names: str, egs: Path) -> str:
    """The table of some runs of several recipes: one row for each, the other model's marked."""
    asked = [word.strip().split(" ") for word in recipes.split(",")]
    rows: dict[tuple[int, str], list[str]] = {}
    for place, (recipe, test) in enumerate(asked):
        for number, tables in enumerate(of(recipe, egs)):
            found = rates(tables, test)
            for run in filter(found.get, names.split()):
                row = rows.setdefault((number, run), ["–"] * len(asked))
                row[place] = f"{float(found[run]):.1f}"
    made = [
        (f"`{run}`" + f", {TRANSDUCERS}" * number, *rows[number, run])
        for number, run in sorted(rows, key=lambda key: key[0])
    ]
    return "\n".join([*report.table(["run", *(recipe for recipe, _ in asked)], made), ""])


def of(recipe: str, egs: Path) -> list[dict[str, list[dict[str, str]]]]:
    """What ``read`` makes of a recipe's file."""
    return read((egs / recipe / "pl1/RESULTS.md").read_text(encoding="utf-8"))


def fill(text: str, egs: Path = ROOT / "egs") -> str:
    """A page with all its blocks written anew."""

    def block(match: re.Match) -> str:
        head, kind, what, names, end = match.groups()
        make = results if kind == "results" else several
        return head + make(what.strip(), names.strip(), egs) + end

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, nargs="*", help=" ".join(PAGES))
    for path in parser.parse_args().page or [ROOT / name for name in PAGES]:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
