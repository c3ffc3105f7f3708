"""RESULTS.md: the numbers of `measure` as tables, with what it takes to make them again."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from espnet_pl.recipe import config, markers
from espnet_pl.recipe.progress import duration

DETAILS = "Details"  # the heading where what is printed ends
NINE = ("dataset", "Snt", "Wrd", "Corr", "Sub", "Del", "Ins", "Err", "S.Err")


def markdown(result: Mapping, recipe: config.Recipe, other: Mapping | None = None) -> str:
    """The whole file; only the section on commands and machines depends on time and place.

    Args:
        result: the numbers of `measure`.
        recipe: names the oracle.
        other: the numbers of another model, read from its ``results.json``: a block of their own.
    """
    body = ["# Results", *_rates(result), *_against(result, recipe), *_costs(result)]
    body += _block(other, recipe) if other else []
    body += [
        f"\n## {DETAILS}",
        *_details(result, "word", "WER"),
        *_details(result, "character", "CER"),
    ]
    return "\n".join([*body, *_origin(result)]) + "\n"


def replace(path: Path, text: str) -> None:
    """Writes the file; it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _block(other: Mapping, recipe: config.Recipe) -> list[str]:
    lines = [*_rates(other), *_against(other, recipe), *_costs(other)]
    return [
        f"\n## Students of another model: {other['asr_config']}\n",
        "Splits are the same; baseline and oracle are this model's own; the tables say which seeds "
        "and how many updates. Compare these runs with each other: from those above they differ "
        f"by their model, too. Details and commands: {other['output']}.",
        *(line.replace("\n## ", "\n### ", 1) for line in lines),
    ]


def _rates(result: Mapping) -> list[str]:
    # Of numbers that were read from a file, seeds are words.
    seeds = sorted({seed for costs in result["runs"].values() for seed in costs}, key=int)
    rows, notes = [], []
    for name, entry in result["sets"].items():
        for run, scores in entry["runs"].items():
            word = {seed: figures["err"] for seed, figures in scores["word"].items()}
            each = [_number(word.get(seed)) for seed in seeds] if len(seeds) > 1 else []
            character = mean(figures["err"] for figures in scores["character"].values())
            rows.append([name, run, f"**{mean(word.values()):.2f}**", *each, _number(character)])
            for seed, count in scores["missing"].items():
                if count:
                    notes.append(
                        f"{run} seed {seed}, {name}: {count} utterances have no hypothesis "
                        "(counted as deletions)."
                    )
    names = [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else []
    head = ["set", "run", f"WER % {'mean' if names else f'(seed {seeds[0]})'}", *names, "CER %"]
    return ["\n## Word error rate\n", *table(head, rows), *(f"\n{note}" for note in notes)]


def _against(result: Mapping, recipe: config.Recipe) -> list[str]:
    lines = []
    for base in {base: None for entry in result["sets"].values() for base in entry["against"]}:
        rows = []
        for name, entry in result["sets"].items():
            for run, found in entry["against"].get(base, {}).items():
                low, high = found["interval"]
                rows.append([
                    name, run, f"{found['difference']:+.2f}", f"[{low:+.2f}, {high:+.2f}]",
                    _number(found["relative"], 1), _number(found["recovery"], 1),
                    len(found["seeds"]), found["verdict"],
                ])  # fmt: skip
        head = ["set", "run", "WER points", "95 % interval", "relative reduction %",
                "recovered %", "seeds", "verdict"]  # fmt: skip
        if rows:
            lines += [f"\n## Against {base}\n", *table(head, rows)]
    if lines:
        drawn = {name: entry["drawn"] for name, entry in result["sets"].items()}
        kinds = "; ".join(f"{name}: {kind}" for name, kind in drawn.items())
        lines.append(
            f"\nIntervals: paired bootstrap over seeds and over ({kinds}). *inconclusive*: the "
            "interval contains 0, or fewer than three seeds. Recovered: share of the gain of "
            f"`{recipe.oracle}` (– where that gain is not certain)."
        )
    return lines


def _costs(result: Mapping) -> list[str]:
    rows, total = [], [0.0, 0.0]
    for run, costs in _trained(result).items():
        wall, cpu, updates = (_known(costs, key) for key in ("wall_s", "cpu_s", "updates"))
        total = [sum(wall, total[0]), sum(cpu, total[1])]
        gpus = max(_known(costs, "gpus"), default=0)
        rows.append([
            run, result["inits"].get(run) or "random", ", ".join(map(str, costs)),
            f"{mean(updates):.0f}" if updates else "?",
            duration(mean(wall)) if wall else "?", duration(mean(cpu)) if cpu else "?", gpus,
        ])  # fmt: skip
    head = ["run", "starts from", "seeds", "updates", "wall time", "CPU time", "GPUs"]
    note = (
        "\nOne training, mean over seeds, without the run it starts from. All trainings together: "
        f"{duration(total[0])} of wall time, {duration(total[1])} of CPU time."
    )
    return ["\n## Training\n", *table(head, rows), note]


def _details(result: Mapping, unit: str, title: str) -> Iterable[str]:
    rows = []
    for name, entry in result["sets"].items():
        for run, scores in entry["runs"].items():
            seeds = list(scores[unit].values())
            figures = {key: mean(one[key] for one in seeds) for key in seeds[0]}
            shares = [f"{figures[key]:.1f}" for key in figures if key not in ("snt", "wrd")]
            rows.append([f"{run}/{name}", seeds[0]["snt"], seeds[0]["wrd"], *shares])
    yield f"\n### {title}, mean over seeds\n"
    yield from table(NINE, rows)
    if unit == "word" and result["sclite"]["found"]:
        differs = result["sclite"]["differs"]
        yield "\nScored by jiwer; sclite counts the same in every row." if not differs else (
            "\nScored by jiwer; sclite aligns with other costs and counts otherwise "
            "(correct, substitutions, deletions, insertions): "
            + "; ".join(f"{d['run']} seed {d['seed']} {d['set']} {d['sclite']}, jiwer {d['jiwer']}"
                        for d in differs) + "."
        )  # fmt: skip


def _origin(result: Mapping) -> list[str]:
    runs, trained = result["runs"], _trained(result)
    seeds = sorted({seed for costs in runs.values() for seed in costs})
    listed = ",".join(map(str, seeds))
    lines = ["\n## Commands\n", "```", f"./run.sh --method {','.join(runs)} --seed {listed}"]
    asr, expdir = Path(result["asr_config"]), Path(result["expdir"])
    lines[-1] += f" --asr_config {asr}" if asr != config.ASR else ""
    lines[-1] += f" --expdir {expdir}" if expdir != config.default_expdir(asr) else ""
    for run, costs in trained.items():
        shell = next(iter(costs.values()))["shell"]
        lines += [f"\n# {run}, training", shell] if shell else []
    lines += ["```", "\n## Made with\n"]
    made: dict[str, list[str]] = {}
    for run, costs in trained.items():
        for seed, cost in costs.items():
            about = cost["environment"] or {"environment": "not recorded"}
            text = "\n".join(f"- {key}: {value}" for key, value in about.items())
            made.setdefault(text, []).append(f"{run} seed {seed}")
    for text, names in made.items():
        lines += [f"{', '.join(names) if len(made) > 1 else 'All runs'}:\n", text, ""]
    lines.append(f"Measured on {time.strftime('%Y-%m-%d')} at commit {markers.commit()}.")
    return lines


def _trained(result: Mapping) -> dict:
    """What was trained: runs that others start from or are taught by, then those scored."""
    return {**result["before"], **result["runs"]}


def _known(costs: Mapping, key: str) -> list[float]:
    return [cost[key] for cost in costs.values() if cost[key] is not None]


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """The lines of a table."""
    return ["|" + "|".join(map(str, row)) + "|" for row in (head, ["---"] * len(head), *rows)]
