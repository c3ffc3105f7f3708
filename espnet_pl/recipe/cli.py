"""The flags of ``run.sh``: ESPnet's, in both spellings; a mistake is refused before work."""

import argparse
import contextlib
import os
import re
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from espnet_pl.recipe import check, config, launch, progress, report, stages, study, teachers
from espnet_pl.recipe.config import RecipeError
from espnet_pl.recipe.runs import Run, load_runs, with_inits, write_phases

NUMBERS = [str(number) for number, _ in enumerate(stages.STAGES, 1)]
NAMES = [stage.__name__ for stage in stages.STAGES]
EXAMPLES = """examples:
  ./run.sh                                              the default runs, from data to RESULTS.md
  ./run.sh --method all --seed 1,2,3                    the whole table, three seeds
  ./run.sh --method slimipl --stage train --stop_stage measure --ngpu 1
  ./run.sh --method slimipl --stage train --num_processes 4 --nj 1
  ./run.sh --method all --dry_run                       print every command, do nothing
  ./run.sh --cmd slurm --slurm_opts '--time 2:00:00 -A lab'   in Slurm; again: finds its jobs
"""


def main(argv: Sequence[str]) -> int:
    """Runs the stages; 0 if all went well, 2 for a mistake of the user, 130 when stopped."""
    try:
        with contextlib.ExitStack() as afterwards:
            return _main(argv, afterwards)
    except (RecipeError, launch.LaunchError) as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # what reads our lines has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(argv: Sequence[str], afterwards: contextlib.ExitStack) -> int:
    began = time.monotonic()
    args = _parse(argv)
    recipe = config.load_recipe()
    calls = [_call(own, recipe, afterwards) for own in _models(args, recipe)]
    # Refused now, not after the first stage.
    launch.backend(args.cmd, args.slurm_opts, args.dry_run)
    print(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(['./run.sh', *argv])}", flush=True)
    plans = [_plan(call, recipe) for call in calls]  # mistakes are told before work on any
    for call, plan in zip(calls, plans):
        if len(calls) > 1:
            print(f"# {plan.asr}, in {plan.expdir}", flush=True)
        _stages(call, plan)
    if not args.dry_run:
        print(f"finished in {progress.duration(time.monotonic() - began)}")
    return 0


@dataclass(frozen=True)
class _Call:
    """What is asked of one model."""

    args: argparse.Namespace
    runs: dict[str, Run]
    chosen: list[str]
    seeds: list[int]
    numbers: list[int]  # of stages
    of_study: study.Study | None = None
    pairs: Sequence[tuple[str, int]] = ()  # its cells and seeds


def _models(args: argparse.Namespace, recipe: config.Recipe) -> list[argparse.Namespace]:
    """The call for each model that it is about; the one whose table shows both comes last."""
    if args.method != "all" or args.study:
        return [args]
    if args.asr_config != config.ASR or not recipe.other_model:
        return [args]
    asr = Path(recipe.other_model)
    other = {"asr_config": asr, "expdir": config.beside(args.expdir, asr)}
    return [argparse.Namespace(**{**vars(args), **other}), args]


def _call(
    args: argparse.Namespace, recipe: config.Recipe, afterwards: contextlib.ExitStack
) -> _Call:
    if not args.asr_config.exists():
        found = sorted(map(str, Path("conf").glob("asr*.yaml")))
        where = "recipe.yaml: other_model" if str(args.asr_config) == recipe.other_model else None
        guess = config.did_you_mean(str(args.asr_config), found)
        raise RecipeError(f"{where or '--asr_config'}: {guess}")
    runs = load_runs(recipe, args.asr_config, args.expdir)
    numbers = _numbers(args)
    if args.dry_run:  # the files of phases and cells are needed to look at them, and no longer
        afterwards.enter_context(config.removed(args.expdir))
    write_phases(runs.values())
    if args.study:
        of_study = study.load(args.study, recipe, runs, args.asr_config, args.expdir)
        pairs = study.chosen(of_study, args.method, _seeds(args.seed) if args.seed else None)
        last = NAMES.index("train") + 1
        numbers = [number for number in numbers if number <= last]
        chosen, seeds = ([*dict.fromkeys(values)] for values in zip(*pairs))
        return _Call(args, of_study.runs, chosen, seeds, numbers, of_study, pairs)
    chosen = _chosen(args.method, recipe, runs, args.asr_config)
    return _Call(args, runs, chosen, _seeds(args.seed) if args.seed else recipe.seeds, numbers)


def _plan(call: _Call, recipe: config.Recipe) -> stages.Plan:
    args, runs = call.args, call.runs
    needed = with_inits(call.chosen, runs)
    seen = [*args.expdir.glob("*/infer"), *args.expdir.glob("seed*/*/infer")]
    others = _with_phases({path.parent.name for path in seen} & {*runs}, runs) - {*needed}
    verdicts = {}
    if {"train_lm", "train", "measure"} & {NAMES[number - 1] for number in call.numbers}:
        verdicts = check.check_runs(
            needed, sorted(others), runs, args.expdir, write=not args.dry_run
        )
        teachers.refuse(runs, verdicts)
        check.refuse_unused(runs, verdicts)
    known = {name: run for name, run in runs.items() if name not in others or name in verdicts}
    return stages.Plan(
        recipe, known, tuple(call.chosen), tuple(call.seeds), verdicts,
        args.asr_config, args.expdir, args.dumpdir, args.ngpu, args.nj, args.teacher_mode,
        args.num_processes,
    )  # fmt: skip


def _stages(call: _Call, plan: stages.Plan) -> None:
    args, runs = call.args, call.runs
    needed = with_inits(call.chosen, runs)
    for number in call.numbers:
        stage = stages.STAGES[number - 1]
        print(f"Stage {number}: {stage.__name__}", flush=True)
        if call.of_study and stage is stages.train:
            jobs = list(study.jobs(plan, call.of_study, call.pairs))
        else:
            jobs = list(stage(plan))
        if not jobs:
            print("nothing to do")
        inits = {*needed} - _with_phases(call.chosen, runs)
        force = {job.name for job in jobs if args.force and _redone(job, inits)}
        history = [args.expdir, Path("log")]
        launch.run(
            jobs, args.cmd, args.nj, args.dry_run, force, history, args.slurm_opts, args.keep_going
        )
        if stage is stages.measure and not args.dry_run:
            table = stages.results(plan)
            print(table.read_text(encoding="utf-8").partition(f"\n## {report.DETAILS}")[0])
            print(f"the rest is in {table}")


def _with_phases(names: Collection[str], runs: dict[str, Run]) -> set[str]:
    return {*names, *(phase for name in names for phase in runs[name].before)}


def _redone(job: launch.Job, inits: Collection[str]) -> bool:
    """Whether ``--force`` is about a job."""
    kind, whose = [*job.name.split(), ""][:2]
    if kind in ("lm_text", "train_lm"):
        return bool(job.why())
    if kind == "label" and (whose in inits or " seed " not in job.name):
        return bool(job.why())  # for its own sake only; the same speech would be heard again
    # A run that is only a starting point was not named: it stays as it is.
    return whose not in inits


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="run.sh", usage="./run.sh [--flag value ...]", allow_abbrev=False,
        description=_describe(argv), epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add, cores = parser.add_argument, len(os.sched_getaffinity(0))
    add("--stage", default="1", help="first stage, by number or name (1)")
    add("--stop_stage", default=str(len(NAMES)), help=f"last stage ({len(NAMES)})")
    add("--skip_stages", default="", help="stages left out, for instance '1 3' or measure")
    add("--method", help="runs, separated by commas, or all (recipe.yaml: default)")
    add("--study", help="cells of conf/studies/STUDY.yaml; --method picks some: 'soft*,hard-1'")
    add("--seed", help="seeds, separated by commas (recipe.yaml: seeds)")
    add("--ngpu", type=int, default=0, help="GPUs of a training; 0 is the CPU (0)")
    add(
        "--nj",
        type=int,
        default=min(cores, 4),
        help=f"jobs at a time, or in the queue ({min(cores, 4)})",
    )
    add("--num_processes", type=int, default=1, help="processes of a training on the CPU (1)")
    add("--cmd", default=_backend(), help="local or slurm (cmd.sh)")
    add("--slurm_opts", default="", help="more for sbatch, after conf/slurm.conf: '--time 2:00:00'")
    add("--asr_config", type=Path, help=f"the model ({config.ASR}, or that of the study)")
    add("--expdir", type=Path, help="experiments (exp; exp_NAME with --asr_config conf/NAME.yaml)")
    add("--teacher_mode", choices=("stored", "online"), help="of runs that are taught (their yaml)")
    add("--dumpdir", type=Path, default=Path("dump"), help="audio made by local/data.sh (dump)")
    for flag, text in (
        ("--dry_run", "print the commands of all stages and touch nothing"),
        ("--force", "redo; an earlier training's folder is moved aside, never mixed"),
        ("--keep_going", "after a failure, do what does not wait for the job that failed"),
    ):
        add(flag, nargs="?", const=True, default=False, type=_yes, metavar="true|false", help=text)
    words = [_underscored(word) for word in argv]
    args, unknown = parser.parse_known_args(words)
    if unknown:
        flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        raise RecipeError(config.did_you_mean(unknown[0].partition("=")[0], flags))
    if args.num_processes < 1 or (args.num_processes > 1 and args.ngpu):
        raise RecipeError(
            f"--num_processes {args.num_processes} --ngpu {args.ngpu}: give one process or more of "
            "CPUs, or GPUs, which have one each"
        )
    own = study.model(args.study) if args.study else None
    if own and args.asr_config not in (None, own):
        raise RecipeError(f"--asr_config {args.asr_config}: the study {args.study} is of {own}")
    args.asr_config = args.asr_config or own or config.ASR
    args.expdir = args.expdir or config.default_expdir(args.asr_config)
    return args


def _backend() -> str:
    """``cmd_backend``: of the environment, else as cmd.sh sets it."""
    script = Path("cmd.sh")
    text = script.read_text(encoding="utf-8") if script.exists() else ""
    found = re.findall(r"^\s*(?:export\s+)?cmd_backend=[\"']?(\w+)", text, re.MULTILINE)
    return os.environ.get("cmd_backend") or [*found, "local"][0]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise RecipeError(f"{message}; see ./run.sh --help")


def _underscored(word: str) -> str:
    """``--stop-stage=3`` -> ``--stop_stage=3``."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    return f"--{flag.replace('-', '_')}{equals}{value}"


def _describe(argv: Sequence[str]) -> str:
    """Stages and runs, for ``--help``."""
    if not {"--help", "-h"} & {*argv}:
        return ""
    lines = ["Trains, recognises and measures the runs of this recipe.", "", "stages:"]
    for number, stage in enumerate(stages.STAGES, 1):
        lines.append(f"  {number} {stage.__name__:<16} {stage.__doc__.splitlines()[0]}")
    try:
        recipe = config.load_recipe()
        runs = load_runs(recipe)
        lines += ["", "runs (conf/<run>.yaml):"]
        for name, run in runs.items():
            start = f", starts from {run.options.init}" if run.options.init else ""
            others = ", ".join(run.options.teachers)
            taught = f", taught by {others}" if others else ""
            usual = " (default)" if name in recipe.default else ""
            lines.append(f"  {name:<24} method {run.method}{start}{taught}{usual}")
    except RecipeError as error:
        lines += ["", f"runs: {error}"]
    return "\n".join(lines)


def _chosen(
    method: str | None, recipe: config.Recipe, runs: dict[str, Run], asr: Path
) -> list[str]:
    names = recipe.default if method is None else [*filter(None, method.split(","))]
    if names == ["all"]:
        own = str(asr) == recipe.other_model and recipe.other_methods
        names = own or recipe.methods
    named = [recipe.oracle] if recipe.oracle != config.Recipe.oracle else []
    for name in [*names, *recipe.methods, recipe.baseline, *named]:
        if name not in runs:
            where = "--method" if name in names and method not in (None, "all") else "recipe.yaml"
            for model in sorted(Path("conf").glob("asr*.yaml")):
                if (model.with_suffix("") / f"{name}.yaml").exists():
                    raise RecipeError(f"{where}: {name} is of another model: --asr_config {model}")
            raise RecipeError(f"{where}: {config.did_you_mean(name, runs)}")
    if not names:
        raise RecipeError("--method: no run given")
    return list(dict.fromkeys(names))


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise RecipeError(f"--seed {text}: expected numbers separated by commas") from None


def _numbers(args: argparse.Namespace) -> list[int]:
    first, last = _number("--stage", args.stage), _number("--stop_stage", args.stop_stage)
    skip = {_number("--skip_stages", word) for word in args.skip_stages.replace(",", " ").split()}
    if first > last:
        raise RecipeError(f"--stage {args.stage} is after --stop_stage {args.stop_stage}")
    return [number for number in range(first, last + 1) if number not in skip]


def _number(flag: str, word: str) -> int:
    if word in NAMES:
        return NAMES.index(word) + 1
    if word.isdigit():
        number = int(word)
        if flag == "--stop_stage":  # ESPnet users write 10000 for "to the end"
            number = min(number, len(NAMES))
        if 1 <= number <= len(NAMES):
            return number
    raise RecipeError(f"{flag}: {config.did_you_mean(word, [*NUMBERS, *NAMES])}")


def _yes(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("expected true or false")
    return word.lower() == "true"
