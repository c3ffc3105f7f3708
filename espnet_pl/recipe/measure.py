"""From hypotheses to numbers one may believe: error rates, intervals, recovery rates.

    WER = (S + D + I) / N of all utterances of a set, mean over the seeds
    difference = WER_run − WER_base, of the seeds that both have
    recovery = (WER_base − WER_run) / (WER_base − WER_oracle)

The interval of a difference is a paired percentile bootstrap: utterances (whole speakers where
there are enough) are drawn with replacement, the same ones for both runs and all seeds, and seeds
are drawn with replacement, the same ones for both runs; 95 % of the differences lie inside.
Source: Bisani and Ney, Bootstrap estimates for confidence intervals in ASR performance
evaluation, ICASSP 2004.

Usage: ``python3 -m espnet_pl.recipe.measure [--expdir exp] [--run RUN:SEED]... [--output FILE]``
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from espnet_pl.recipe import config, markers, report, scoring
from espnet_pl.recipe.runs import load_runs, with_inits

REPLICATES = 10_000
SPEAKERS = 8  # fewer say too little about speakers not heard; then utterances are drawn
SEEDS = 3  # fewer say nothing about another seed: no verdict
CHUNK = 2_000_000  # draws held in memory at a time


@dataclass(frozen=True)
class Reference:
    """A test set (or several as one): what was said, and which utterances are drawn together."""

    name: str
    texts: dict[str, str]  # by "set/utterance"
    clusters: np.ndarray  # [n]
    drawn: str  # "utterances" or "speakers"


def read_reference(name: str, sets: Sequence[str]) -> Reference:
    """Reads ``text`` and, if there are enough speakers, ``utt2spk`` of the sets."""
    texts, speakers = {}, {}
    for part in sets:
        folder = Path("data") / part
        texts |= {f"{part}/{key}": text for key, text in scoring.read_text(folder / "text").items()}
        if (folder / "utt2spk").exists():
            table = scoring.read_text(folder / "utt2spk")
            speakers |= {f"{part}/{key}": speaker for key, speaker in table.items()}
    known = [speakers.get(key) for key in texts]
    by_speaker = None not in known and len(set(known)) >= SPEAKERS
    _, clusters = np.unique(known if by_speaker else list(texts), return_inverse=True)
    return Reference(name, texts, clusters, "speakers" if by_speaker else "utterances")


def resample(
    columns: np.ndarray, clusters: np.ndarray, replicates: int, seed: int = 0
) -> np.ndarray:
    """Sums of the columns over clusters drawn with replacement: [n, k] -> [replicates, k]."""
    total = int(clusters.max()) + 1
    sums = np.zeros((total, columns.shape[1]))
    np.add.at(sums, clusters, columns)
    rng, out = np.random.default_rng(seed), np.empty((replicates, columns.shape[1]))
    step = max(1, CHUNK // total)
    for begin in range(0, replicates, step):
        rows = min(step, replicates - begin)
        draws = rng.integers(total, size=(rows, total)) + total * np.arange(rows)[:, None]
        times = np.bincount(draws.ravel(), minlength=rows * total).reshape(rows, total)
        out[begin : begin + rows] = times @ sums
    return out


def interval(run: np.ndarray, base: np.ndarray, units: np.ndarray, seed: int = 1) -> list[float]:
    """The 95 % interval of the difference of two error rates, in points, of ``differences``."""
    return middle(differences(run, base, units, seed))


def middle(drawn: np.ndarray) -> list[float]:
    """Between which values 95 % of the replicates are."""
    return [float(value) for value in np.percentile(drawn, [2.5, 97.5])]


def differences(run: np.ndarray, base: np.ndarray, units: np.ndarray, seed: int = 1) -> np.ndarray:
    """Differences of two error rates, in points, of drawn speech and seeds: [replicates].

    Args:
        run: resampled errors, [replicates, s], one column per seed.
        base: the same of the other run, the same seeds in the same order.
        units: resampled reference units, [replicates].
        seed: decides which seeds are drawn.
    """
    return 100 * _drawn(run - base, seed) / np.maximum(units, 1)


def recovery_interval(
    run: np.ndarray, base: np.ndarray, oracle: np.ndarray, seed: int = 1
) -> list[float]:
    """The 95 % interval of a recovery, in per cent.

    Where the oracle gains nothing, as it may in a few replicates, a share of it could be anything.

    Args:
        run: resampled errors, [replicates, s], one column per seed.
        base: the same of the run that recovers nothing, the same seeds in the same order.
        oracle: the same of the run that recovers all.
    """
    mine, gain = _drawn(base - run, seed), _drawn(base - oracle, seed)
    share = 100 * mine / np.where(gain > 0, gain, 1)
    low = np.percentile(np.where(gain > 0, share, -np.inf), 2.5, method="lower")
    high = np.percentile(np.where(gain > 0, share, np.inf), 97.5, method="higher")
    return [float(low), float(high)]


def _drawn(errors: np.ndarray, seed: int) -> np.ndarray:
    """The mean of seeds drawn with replacement: [replicates, s] -> [replicates]."""
    replicates, seeds = errors.shape
    draws = np.random.default_rng(seed).integers(seeds, size=(replicates, seeds))
    return np.take_along_axis(errors, draws, axis=1).mean(axis=1)


def verdict(low: float, high: float, seeds: int) -> str:
    """``better``, ``worse`` or ``inconclusive``."""
    if seeds < SEEDS or low <= 0 <= high:
        return "inconclusive"
    return "better" if high < 0 else "worse"


def recovery(base: float, run: float, oracle: float) -> float | None:
    """How much of the oracle's gain is reached, in per cent; None where there is no gain."""
    return 100 * (base - run) / (base - oracle) if base > oracle else None


def score(reference: Reference, folders: dict[int, Path], sets: Sequence[str]) -> dict:
    """Counts of one run on one reference, for every seed: word and character arrays and notes."""
    out = {"word": {}, "character": {}, "texts": {}, "missing": {}}
    for seed, folder in folders.items():
        found = {}
        for part in sets:
            table = scoring.read_text(folder / "infer" / part / "text")
            found |= {f"{part}/{key}": text for key, text in table.items()}
        if odd := sorted(set(found) - set(reference.texts)):
            raise SystemExit(f"{folder}: {len(odd)} hypotheses without reference: {odd[:5]}")
        out["missing"][seed] = len(reference.texts) - len(found)
        texts = {key: found.get(key, "") for key in reference.texts}
        out["texts"][seed] = texts
        for unit in ("word", "character"):
            pair = list(reference.texts.values()), list(texts.values())
            out[unit][seed] = scoring.align(*pair, unit)
    return out


def measure(recipe: config.Recipe, found: dict[str, dict[int, Path]]) -> dict:
    """All numbers of all runs, as plain data (``results.json``).

    Args:
        recipe: sets, baseline and oracle.
        found: by run and seed, the folder with ``infer/<set>/text``.
    """
    groups = {name: [name] for name in recipe.test}
    if recipe.report_together:
        groups["+".join(recipe.report_together)] = recipe.report_together
    program = scoring.find_sclite()
    result = {"sets": {}, "runs": {run: _training(run, seeds) for run, seeds in found.items()}}
    result["sclite"] = {"found": bool(program), "differs": []}
    for name, sets in groups.items():
        reference = read_reference(name, sets)
        scores = {run: score(reference, folders, sets) for run, folders in found.items()}
        entry = {"utterances": len(reference.texts), "drawn": reference.drawn, "runs": {}}
        for run, scored in scores.items():
            entry["runs"][run] = {
                "missing": scored["missing"],
                **{
                    unit: {seed: scoring.summary(counts) for seed, counts in scored[unit].items()}
                    for unit in ("word", "character")
                },
            }
            for seed, counts in scored["word"].items() if program else ():
                theirs = scoring.sclite(program, reference.texts, scored["texts"][seed])
                if theirs != (ours := counts.sum(axis=0).tolist()):
                    row = {"run": run, "seed": seed, "set": name, "sclite": theirs, "jiwer": ours}
                    result["sclite"]["differs"].append(row)
        entry["against"] = {
            base: _against(reference, {run: s["word"] for run, s in scores.items()}, base, recipe)
            for base in dict.fromkeys([recipe.baseline, "supervised"])
            if base in scores
        }
        result["sets"][name] = entry
    return result


def _against(reference: Reference, counts: dict, base: str, recipe: config.Recipe) -> dict:
    """Every other run against ``base``."""
    columns = [(run, seed) for run, by_seed in counts.items() for seed in by_seed]
    errors = np.stack([counts[run][seed][:, 1:].sum(axis=1) for run, seed in columns], axis=1)
    units = next(iter(counts[base].values()))[:, :3].sum(axis=1)
    sums = resample(np.column_stack([errors, units]), reference.clusters, REPLICATES)
    place = {column: index for index, column in enumerate(columns)}
    rates = 100 * errors.sum(axis=0) / max(units.sum(), 1)

    def rate(run: str, seeds: Sequence[int]) -> float:
        return float(np.mean([rates[place[run, seed]] for seed in seeds]))

    def limits(run: str, seeds: Sequence[int]) -> list[float]:
        own, other = ([place[name, seed] for seed in seeds] for name in (run, base))
        return interval(sums[:, own], sums[:, other], sums[:, -1])

    out = {}
    for run in counts:
        seeds = sorted(set(counts[run]) & set(counts[base]))
        if run == base or not seeds:
            continue
        low, high = limits(run, seeds)
        mine, theirs = rate(run, seeds), rate(base, seeds)
        # A share of a gain that may be nothing says nothing.
        gains = set(seeds) <= set(counts.get(recipe.oracle, {})) and base != recipe.oracle
        gains = gains and limits(recipe.oracle, seeds)[1] < 0
        out[run] = {
            "seeds": seeds,
            "difference": mine - theirs,
            "interval": [low, high],
            "relative": 100 * (theirs - mine) / theirs if theirs else None,
            "recovery": recovery(theirs, mine, rate(recipe.oracle, seeds)) if gains else None,
            "verdict": verdict(low, high, len(seeds)),
        }
    return out


def _training(run: str, folders: dict[int, Path]) -> dict:
    """What the training of a run cost and with what it was made, by seed."""
    out = {}
    for seed, folder in folders.items():
        marker = markers.read(folder / "train.job.json") or {}
        kept = ("wall_s", "cpu_s", "max_rss_mb", "gpus", "environment", "shell", "finished")
        out[seed] = {**{key: marker.get(key) for key in kept}, "updates": updates(folder)}
    return out


def updates(folder: Path) -> int | None:
    """Optimiser updates of a training: ESPnet's count of batches over ``accum_grad``."""
    log, conf = folder / "train.log", folder / "config.yaml"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    counts = re.findall(r"epoch results: \[train\] [^\[]*total_count=(\d+)", text)
    if not counts:
        return None
    every = (markers.load_yaml(conf) or {}).get("accum_grad", 1) if conf.exists() else 1
    return int(counts[-1]) // int(every or 1)


def find_runs(expdir: Path, tests: Sequence[str]) -> list[tuple[str, int]]:
    """All runs and seeds with hypotheses for every test set."""
    found = []
    for folder in [*expdir.glob("*"), *expdir.glob("seed*/*")]:
        inside = re.fullmatch(r"seed(\d+)", folder.parent.name) if folder.parent != expdir else None
        if all((folder / "infer" / test / "text").exists() for test in tests):
            found.append((folder.name, int(inside[1]) if inside else 1))
    return sorted(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, writes RESULTS.md and results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--asr_config", type=Path, default=config.ASR)
    parser.add_argument("--expdir", type=Path, default=Path("exp"))
    parser.add_argument("--run", action="append", help="RUN:SEED; default: all there are")
    parser.add_argument("--output", type=Path, default=Path("RESULTS.md"))
    args = parser.parse_args(argv)
    try:
        recipe = config.load_recipe()
        runs = load_runs(recipe, args.asr_config, args.expdir)
        if args.run:
            words = [word.rpartition(":") for word in args.run]
            pairs = [(run, int(seed)) for run, _, seed in words]
        else:
            pairs = [pair for pair in find_runs(args.expdir, recipe.test) if pair[0] in runs]
        found: dict[str, dict[int, Path]] = {}
        for run, seed in pairs:
            found.setdefault(run, {})[seed] = config.run_dir(run, seed, args.expdir)
        if not found:
            raise SystemExit(f"no hypotheses in {args.expdir}/<run>/infer")
        result = measure(recipe, found)
        result |= {"asr_config": str(args.asr_config), "expdir": str(args.expdir)}
        result["output"] = str(args.output)
        seeds = sorted({seed for folders in found.values() for seed in folders})
        result["before"] = {}
        for run in with_inits([run for run in found if run in runs], runs):
            folders = {seed: config.run_dir(run, seed, args.expdir) for seed in seeds}
            made = {s: path for s, path in folders.items() if (path / "train.job.json").exists()}
            if made and run not in found:
                result["before"][run] = _training(run, made)
    except (config.RecipeError, ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    trained = [*result["before"], *found]
    inits = {run: runs[run].options.init if run in runs else None for run in trained}
    result["inits"] = inits
    path = config.other_results(recipe, args.asr_config, args.expdir)
    text = report.markdown(result, recipe, markers.read(path) if path else None)
    report.replace(args.output, text)
    report.replace(args.expdir / "results.json", json.dumps(result, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
