#!/usr/bin/env python3
"""Fill the page of a study, docs/studies/<study>.md, from its records in docs/studies/data.

A block of the page is written anew between its lines,

    <!-- table fsdd: against hard-10: * -->           cells by patterns, differences to one of them
    <!-- table fsdd: against hard-10 on test: * -->   the same on other speech than the first set
    <!-- figure fsdd: blank_share frame_entropy: hard-none soft-none -->
    <!-- ladder fsdd: on test: hard full -->          cells X-hard, X-full of teachers teacher-X
    <!-- ladder fsdd: on test less dev: hard full --> how many more errors they make here than there
    <!-- recovery fsdd: from continued to oracle on test: lm* -->     shares of an oracle's gain
    <!-- origin -->            how many trainings there are, when, of which commits, on what machine
    <!-- end -->

everything else is left as it is.  A figure lies beside the page, with one panel for each quantity
and one line for each cell: the mean of its seeds, and each seed thinly.  A ladder is a table, and a
figure of students' errors against their teachers', with one line for each way to learn; differences
are to the first.  With ``less`` there is no figure, and a difference says whether a way to learn
makes more of the difference between two kinds of speech.

Usage: tools/study_page.py soft_pl
"""

import argparse
import fnmatch
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from espnet_pl.recipe import measure

FOLDER = Path(__file__).resolve().parents[1] / "docs/studies"
BLOCK = re.compile(
    r"(<!-- (table|figure|ladder|recovery) ([^:]+): ([^:]+): (.+?) -->\n).*?(<!-- end -->)", re.S
)
ORIGIN = re.compile(r"(<!-- origin -->\n).*?(<!-- end -->)", re.S)
LAST = 100  # updates at the end of a training over which a quantity is averaged
DIAGNOSTICS = ("student_blank_share", "student_frame_entropy", "label_error_rate")


def read(study: str, folder: Path) -> dict[str, dict[str, dict[int, dict]]]:
    """The records by corpus, cell and seed."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for path in sorted((folder / "data" / study).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["corpus"]][record["cell"]][record["seed"]] = record
    return found


def picked(cells: dict, patterns: str) -> list[str]:
    """The names that fit, in the order of the patterns; each once."""
    return [*dict.fromkeys(n for p in patterns.split() for n in cells if fnmatch.fnmatch(n, p))]


def rate(records: dict[int, dict], sets: list[str], less: list[str] | None = None) -> list[float]:
    """Word error rates in per cent, one for each seed; of ``sets`` less those of ``less``."""
    out = []
    for record in records.values():
        if unknown := {*sets} - {*record["errors"]}:
            raise SystemExit(
                f"no test set {unknown.pop()!r}: 'on' of {', '.join(record['errors'])}"
            )
        counts = np.array([row for test in sets for row in record["errors"][test].values()])
        out.append(100 * counts[:, 1:].sum() / counts[:, :3].sum())
    return out if not less else [a - b for a, b in zip(out, rate(records, less))]


def interval(
    mine: list[dict[int, dict]],
    base: list[dict[int, dict]],
    sets: list[str],
    less: list[str] | None = None,
) -> tuple[float, float, float, int] | None:
    """The difference in points, its 95 % interval, and of how many seeds; None without any.

    Of several cells the errors are summed: [a, d] against [b, c] is (a - b) - (c - d).  With
    ``less``, the difference on ``sets`` less that on ``less``, which is speech of other people.
    """
    mean, drawn, n = 0.0, 0.0, 0
    for seed, (sign, tests) in enumerate([(1, sets), (-1, less)] if less else [(1, sets)]):
        found = resampled([mine, base], tests, seed)
        if found is None:
            return None
        total, sums = found
        n = len(total) // 2
        mean += sign * 100 * (total[:n].sum() - total[n : 2 * n].sum()) / (n * total[-1])
        drawn += sign * measure.differences(sums[:, :n], sums[:, n : 2 * n], sums[:, -1])
    return float(mean), *measure.middle(drawn), n


def recovered(
    mine: dict[int, dict], base: dict[int, dict], oracle: dict[int, dict], sets: list[str]
) -> str:
    """The share of the oracle's gain in words, with its 95 % interval; – where there is no gain."""
    found = resampled([[mine], [base], [oracle]], sets)
    if found is None:
        return ""
    total, sums = found
    n = len(total) // 3
    run, without, best = (sums[:, place : place + n] for place in (0, n, 2 * n))
    if measure.interval(best, without, sums[:, -1])[1] >= 0:  # a share of what may be nothing
        return "–"
    errors = [total[place : place + n].sum() for place in (n, 0, 2 * n)]
    low, high = measure.recovery_interval(run, without, best)
    told = measure.verdict(-high, -low, n)
    return f"{measure.recovery(*errors):.1f} [{low:.1f}, {high:.1f}] {told}"


def resampled(
    sides: list[list[dict[int, dict]]], sets: list[str], seed: int = 0
) -> tuple[np.ndarray, np.ndarray] | None:
    """Errors of each side's seeds, one side after the other, then words; None without common seeds.

    Of all speech, [k], and of speech that is drawn, [replicates, k]: the same for all sides.
    """
    seeds = sorted(set.intersection(*(set(cell) for side in sides for cell in side)))
    if not seeds:
        return None
    first = sides[-1][0][seeds[0]]
    keys = [(test, key) for test in sets for key in first["errors"][test]]
    columns = [
        [sum(sum(cell[seed]["errors"][test][key][1:]) for cell in side) for test, key in keys]
        for side in sides
        for seed in seeds
    ]
    units = [sum(first["errors"][test][key][:3]) for test, key in keys]
    drawn = [(test, number) for test in sets for number in first["speakers"][test] or []]
    speakers = [*dict.fromkeys(drawn)] if len(drawn) == len(keys) else []
    clusters = np.array([speakers.index(s) for s in drawn] if speakers else range(len(keys)))
    counts = np.array([*columns, units], dtype=float).T
    return counts.sum(axis=0), measure.resample(counts, clusters, measure.REPLICATES, seed)


def last(records: dict[int, dict], name: str) -> float | None:
    """A quantity at the end of training, mean of the seeds."""
    ends = []
    for record in records.values():
        curve = [pair for pair in record["curves"]["train"].get(name, []) if pair[1] is not None]
        if curve:
            ends.append(np.mean([y for x, y in curve if x > curve[-1][0] - LAST]))
    return float(np.mean(ends)) if ends else None


def origin(records: dict[str, dict[str, dict[int, dict]]]) -> str:
    """When, where and of what all trainings of a study are."""
    every = [one for cells in records.values() for of in cells.values() for one in of.values()]
    if not every:
        return ""
    days = sorted({one["finished"][:10] for one in every})
    spent = sum(one["wall_s"] or 0 for one in every) / 3600
    kinds: dict[str, Counter] = defaultdict(Counter)
    for one in every:
        about = dict(one["environment"])
        commit = about.pop("commit", "unknown")
        kinds[", ".join(f"{k} {v}" if k != "machine" else v for k, v in about.items())][commit] += 1
    when = " to ".join(dict.fromkeys([days[0], days[-1]]))
    lines = [f"{len(every)} trainings, {spent:.1f} h in sum, {when}:", ""]
    for about, commits in kinds.items():
        told = ", ".join(f"{commit} ({n})" for commit, n in commits.most_common())
        lines.append(f"- {about}; commits {told}")
    return "\n".join([*lines, ""])


def table(cells: dict, what: str, patterns: str) -> str:
    """One line for each cell; what no training has told is left out."""
    base, _, other = what.removeprefix("against").strip().partition(" on ")
    names = picked(cells, patterns)
    any_record = next(iter(cells[names[0]].values()))
    sets = other.split(",") if other else [next(iter(any_record["errors"]))]
    ends = {cell: [last(cells[cell], name) for name in DIAGNOSTICS] for cell in names}
    told = any(x is not None for of_cell in ends.values() for x in of_cell)
    heads = ["cell", f"{'+'.join(sets)} WER % (seeds)", f"against {base}"]
    heads += ["blank share", "frame entropy", "label errors %", "first alarm"] if told else []
    heads += ["updates", "s"]
    lines = [f"|{'|'.join(heads)}|", "|---" * len(heads) + "|"]
    for cell in names:
        records = cells[cell]
        rates = rate(records, sets)
        each = f" ({', '.join(f'{r:.1f}' for r in rates)})" if len(rates) > 1 else ""
        compared = cell != base and base in cells
        differs = difference([records], [cells[base]], sets) if compared else ""
        row = [cell, f"**{np.mean(rates):.1f}**{each}", differs]
        if told:
            *shares, wrong = ends[cell]
            row += ["–" if x is None else f"{x:.3f}" for x in shares]
            row.append("–" if wrong is None else f"{100 * wrong:.1f}")
            alarms = [str(min(r["alarms"])) if r["alarms"] else "–" for r in records.values()]
            row.append(", ".join(alarms))
        row.append("/".join(dict.fromkeys(str(r["updates"]) for r in records.values())))
        row.append(f"{np.mean([r['wall_s'] or np.nan for r in records.values()]):.0f}")
        lines.append(f"|{'|'.join(row)}|")
    return "\n".join(lines) + "\n"


def recoveries(cells: dict, what: str, patterns: str) -> str:
    """One line for each cell: how much of the way from a baseline to an oracle it makes."""
    ends, _, sets = what.removeprefix("from").partition(" on ")
    base, _, oracle = (name.strip() for name in ends.partition(" to "))
    heads = ["cell", f"{sets.replace(',', '+')} WER % (seeds)", f"against {base}"]
    heads.append(f"recovered of {oracle}'s gain %")
    lines = [f"|{'|'.join(heads)}|", "|---" * len(heads) + "|"]
    for cell in picked(cells, f"{base} {oracle} {patterns}"):
        rates = rate(cells[cell], sets.split(","))
        each = f" ({', '.join(f'{r:.1f}' for r in rates)})" if len(rates) > 1 else ""
        differs = share = ""
        if cell != base and base in cells:
            differs = difference([cells[cell]], [cells[base]], sets.split(","))
            if cell != oracle and oracle in cells:
                share = recovered(cells[cell], cells[base], cells[oracle], sets.split(","))
        lines.append(f"|{cell}|**{np.mean(rates):.1f}**{each}|{differs}|{share}|")
    return "\n".join(lines) + "\n"


def difference(
    mine: list[dict[int, dict]],
    base: list[dict[int, dict]],
    sets: list[str],
    less: list[str] | None = None,
) -> str:
    """``interval`` in words, and of which seeds, if some have others, too; nothing without any."""
    found = interval(mine, base, sets, less)
    if not found:
        return ""
    mean, low, high, n = found
    seeds = [{*cell} for cell in (*mine, *base)]
    told = ""
    if any(of != seeds[0] for of in seeds):
        common = ", ".join(map(str, sorted(set.intersection(*seeds))))
        told = f" (seed{'s' * (n > 1)} {common})"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {measure.verdict(low, high, n)}{told}"


def ladder(cells: dict, corpus: str, what: str, suffixes: str, path: Path) -> str:
    """Students by their teachers, the best one first; draws the picture too, but with ``less``.

    The last column is how much worse the worst teacher makes them than the best one.
    """
    sets, less = (
        [name for name in part.strip().split(",") if name]
        for part in what.removeprefix("on").partition(" less ")[::2]
    )
    worse = {name: np.mean(rate(cells[name], sets)) for name in picked(cells, "teacher-*")}
    teachers = sorted(worse, key=worse.get)
    ways = suffixes.split()
    heads = ["student", *(f"{t}: {worse[t]:.1f} %" for t in teachers), "last − first"]
    lines = [f"|{'|'.join(heads)}|", "|---" * len(heads) + "|"]
    points = {}
    for way in ways:
        row, points[way] = [way], []
        for teacher in teachers:
            name, base = (f"{teacher.removeprefix('teacher-')}-{w}" for w in (way, ways[0]))
            if name not in cells:
                row.append("–")
                continue
            rates = rate(cells[name], sets, less)
            points[way].append((worse[teacher], np.mean(rates), rates))
            each = f" ({', '.join(f'{r:.1f}' for r in rates)})" if len(rates) > 1 else ""
            compared = way != ways[0] and base in cells
            told = difference([cells[name]], [cells[base]], sets, less) if compared else ""
            row.append(f"**{np.mean(rates):.1f}**{each} {told}".strip())
        ends = [
            cells.get(f"{teacher.removeprefix('teacher-')}-{w}")
            for teacher in (teachers[-1], teachers[0])
            for w in (way, ways[0])
        ]
        if all(ends):
            worst, base_worst, best, base_best = ends
            more = np.mean(rate(worst, sets, less)) - np.mean(rate(best, sets, less))
            compared = way != ways[0]
            sides = [worst, base_best], [best, base_worst]
            told = difference(*sides, sets, less) if compared else ""
            row.append(f"**{more:+.1f}** {told}".strip())
        else:
            row.append("–")
        lines.append(f"|{'|'.join(row)}|")
    if not less:
        _draw_ladder(points, path)
        lines.append(f"\n![{suffixes} on {corpus}, by teacher]({path.name})")
    return "\n".join(lines) + "\n"


def _draw_ladder(points: dict[str, list], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made, axis = plt.subplots(figsize=(6.4, 4.6))
    for number, (way, several) in enumerate(points.items()):
        if several:
            x, y, each = zip(*several)
            axis.plot(x, y, color=f"C{number}", label=way, marker="o")
            for at, rates in zip(x, each):
                axis.plot([at] * len(rates), rates, ".", color=f"C{number}", alpha=0.4)
    ends = sorted(x for several in points.values() for x, *_ in several)
    if ends:  # else none of these students has been trained yet
        axis.plot([ends[0], ends[-1]], [ends[0], ends[-1]], ":", color="grey", label="its teacher")
        axis.legend(frameon=False)
    axis.set_xlabel("teacher, WER %")
    axis.set_ylabel("student, WER %")
    axis.grid(alpha=0.3)
    made.tight_layout()
    made.savefig(path, dpi=110)
    plt.close(made)


def figure(cells: dict, quantities: str, patterns: str, path: Path) -> None:
    """Curves of training, one panel for each quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = quantities.split()
    made, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for number, cell in enumerate(picked(cells, patterns)):
            each = []
            for record in cells[cell].values():
                curves = record["curves"]["train"] | record["curves"]["valid"]
                curve = np.array([p for p in curves.get(name, []) if p[1] is not None])
                if len(curve):
                    each.append(curve)
                    axis.plot(*curve.T, color=f"C{number}", linewidth=0.6, alpha=0.5)
            if each:
                length = min(map(len, each))
                mean = np.mean([curve[:length, 1] for curve in each], axis=0)
                axis.plot(each[0][:length, 0], mean, color=f"C{number}", label=cell, linewidth=1.8)
        axis.set_title(name)
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    made.legend(handles, labels, loc="lower center", ncols=min(5, len(labels) or 1), frameon=False)
    made.tight_layout(rect=(0, 0.05 + 0.05 * (len(labels) // 5), 1, 1))
    made.savefig(path, dpi=110)
    plt.close(made)


def fill(study: str, folder: Path = FOLDER) -> None:
    """Write all blocks of the page anew."""
    records, page = read(study, folder), folder / f"{study}.md"
    figures = 0

    def block(match: re.Match) -> str:
        nonlocal figures
        head, kind, corpus, what, patterns, end = match.groups()
        cells = records.get(corpus.strip(), {})
        for name in re.findall(r"\b(?:against|from|to) (\S+)", what) if kind != "figure" else []:
            if not any(name in others for others in records.values()):
                raise SystemExit(f"{page}: {what.strip()!r}: no record of a cell {name!r}")
        wanted = "teacher-*" if kind == "ladder" else patterns
        if not picked(cells, wanted):
            raise SystemExit(f"{page}: no record of {corpus} fits {patterns!r}")
        if kind == "table":
            return head + table(cells, what.strip(), patterns) + end
        if kind == "recovery":
            return head + recoveries(cells, what.strip(), patterns) + end
        figures += kind == "figure" or " less " not in what
        path = folder / f"{study}_{figures}.png"
        if kind == "ladder":
            return head + ladder(cells, corpus.strip(), what.strip(), patterns, path) + end
        figure(cells, what, patterns, path)
        return f"{head}![{what} of {patterns} on {corpus}]({path.name})\n{end}"

    text = BLOCK.sub(block, page.read_text(encoding="utf-8"))
    text = ORIGIN.sub(lambda match: match[1] + origin(records) + match[2], text)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted(path.name for path in (FOLDER / "data").iterdir())
    parser.add_argument("study", choices=known)
    fill(parser.parse_args().study)
