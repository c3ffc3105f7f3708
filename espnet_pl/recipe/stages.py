"""The stages of every recipe, from a corpus to a number and a model to give away.

Run by ``run.sh`` in a recipe's folder.  A stage turns the recipe into jobs (`job.Job`); what is
done and up to date is not run again (`launch`).  Imports neither torch nor ESPnet, which take
seconds.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from espnet_pl.recipe import check, config, language_models, parts, teachers
from espnet_pl.recipe.config import RecipeError
from espnet_pl.recipe.job import Job
from espnet_pl.recipe.runs import Run, is_path, with_inits

PART = 500  # utterances recognised by one job; not --nj, which must not make results old


@dataclass(frozen=True)
class Plan:
    """What a call asks for.  Paths are relative to the recipe's folder."""

    recipe: config.Recipe
    runs: dict[str, Run]
    chosen: tuple[str, ...]
    seeds: tuple[int, ...]
    verdicts: dict[str, check.Verdict]  # what the methods of the runs need
    asr: Path = config.ASR
    expdir: Path = Path("exp")
    dumpdir: Path = Path("dump")
    ngpu: int = 0
    nj: int = 1
    teacher_mode: str | None = None  # of runs that are taught; None: as each of them says
    num_processes: int = 1  # of a training on the CPU

    def dir(self, run: str, seed: int) -> Path:
        """The folder of a run."""
        return config.run_dir(run, seed, self.expdir)

    @property
    def is_trial(self) -> bool:
        """Whether its experiments are in another folder than the model's own."""
        return self.expdir != config.default_expdir(self.asr)

    def all_of(self) -> Iterator[tuple[str, int]]:
        """The chosen runs with every seed."""
        return ((run, seed) for seed in self.seeds for run in self.chosen)


def create_dataset(plan: Plan) -> Iterator[Job]:
    """Write data/<set> with the corpus's own local/data.sh, and check every recording."""
    recipe = plan.recipe
    options = [run.options for run in plan.runs.values()]
    labelled = _unique(recipe.labelled, *(o.labelled for o in options))
    unlabelled = _unique(recipe.unlabelled, *(o.unlabelled for o in options))
    sets = _unique(*labelled, *unlabelled, recipe.valid, *recipe.test)
    lists = tuple(Path(f"data/{name}/wav.scp") for name in sets)
    named = _unique(*labelled, recipe.valid, *recipe.test, *recipe.lm_text)
    texts = tuple(Path(f"data/{name}/text") for name in named)
    yield Job(
        "create_dataset",
        ("bash", "local/data.sh"),
        Path("log/create_dataset.log"),
        inputs=tuple(p for p in [*sorted(Path("local").rglob("*")), Path("db.sh")] if p.is_file()),
        outputs=lists + texts,
        env={"dumpdir": str(plan.dumpdir)},
    )
    argv = ["python3", "-m", "espnet_pl.data.validate"]
    for flag, group in (
        ("--labelled", labelled), ("--unlabelled", unlabelled),
        ("--valid", [recipe.valid]), ("--test", recipe.test),
    ):  # fmt: skip
        argv += [flag, *(f"data/{name}" for name in group)] if group else []
    argv += ["--rate", str(recipe.rate), "--nj", str(plan.nj), "--write_shapes"]
    shapes = tuple(path.with_name("speech_shape") for path in lists)
    log = Path("log/validate.log")
    # More than a few processes wait for the disk; and not every cluster has nodes with more cores.
    cpus = min(plan.nj, 8)
    yield Job("validate", tuple(argv), log, inputs=lists + texts, outputs=shapes, cpus=cpus)


def train_tokenizer(plan: Plan) -> Iterator[Job]:
    """Make the lists of tokens (words, characters or BPE) from transcripts."""
    recipe = plan.recipe
    texts = tuple(Path(f"data/{name}/text") for name in recipe.tokens_from)
    names = with_inits(plan.chosen, plan.runs)
    kinds = (plan.runs[name].options.token_type for name in names)
    for kind in _unique(recipe.token_type, *kinds):
        folder = recipe.tokens(kind)
        size = str(recipe.nbpe) if kind == "bpe" else "0"
        argv = ["python3", "-m", "espnet_pl.recipe.tokens", kind, size, str(folder)]
        yield Job(
            "train_tokenizer" if kind == recipe.token_type else f"train_tokenizer {kind}",
            (*argv, *map(str, texts)), Path(f"log/train_tokenizer_{folder.name}.log"),
            inputs=texts, outputs=recipe.token_files(kind),
        )  # fmt: skip


def collect_stats(plan: Plan) -> Iterator[Job]:
    """Mean and variance of the features, where conf/asr.yaml asks for global_mvn."""
    if not any(run.normalize == "global_mvn" for run in plan.runs.values()):
        return
    folder = plan.expdir / "stats"
    argv, inputs = _training(plan, plan.recipe.labelled, plan.recipe.token_type)
    argv += ["--collect_stats", "true", "--normalize", "none", "--output_dir", str(folder)]
    argv += ["--config", str(plan.asr), "--ngpu", "0"]
    yield Job(
        "collect_stats", tuple(argv), folder / "collect_stats.log",
        inputs=(plan.asr, *inputs), outputs=(_stats(plan),),
    )  # fmt: skip


def train_lm(plan: Plan) -> Iterator[Job]:
    """Train ESPnet's language model on text, for the runs that need one."""
    yield from language_models.jobs(plan)


def train(plan: Plan) -> Iterator[Job]:
    """Train the runs and, before them, those they start from; export each as a stock model."""
    recipe, labelling = plan.recipe, set()
    for seed in plan.seeds:
        for name in with_inits(plan.chosen, plan.runs):
            run, options, folder = plan.runs[name], plan.runs[name].options, plan.dir(name, seed)
            verdict = plan.verdicts.get(name, check.Verdict())
            argv, inputs = _training(plan, options.labelled, options.token_type)
            argv += [word for path in run.files for word in ("--config", str(path))]
            argv += ["--seed", str(seed), "--ngpu", str(plan.ngpu), "--output_dir", str(folder)]
            if plan.num_processes > 1:
                argv += ["--num_processes", str(plan.num_processes)]
            inputs += run.files
            if run.normalize == "global_mvn":
                argv += ["--normalize_conf", f"stats_file={_stats(plan)}"]
                inputs.append(_stats(plan))
            if verdict.unlabelled:
                other = options.unlabelled
                if not other:
                    raise RecipeError(f"recipe.yaml: {name} needs a set 'unlabelled'")
                wav, shape = Path(f"data/{other}/wav.scp"), Path(f"data/{other}/speech_shape")
                argv += ["--unlabelled_data_path_and_name_and_type", f"{wav},speech,sound"]
                argv += ["--unlabelled_shape_file", str(shape)]
                inputs += [wav, shape]
                inputs += [Path(run.batching_labels)] if run.batching_labels else []
                if recipe.truth and other == recipe.unlabelled:
                    argv += ["--truth", f"data/{recipe.truth}/text"]
                    inputs.append(Path(f"data/{recipe.truth}/text"))
            if options.init:
                start = teachers.files(plan, options.init, seed)[1][-1]
                whole = options.take == "model" and _same_tokens(plan, run, start)
                argv += ["--init_param", str(start) if whole else f"{start}:encoder:encoder"]
                inputs.append(start)
            for teacher in options.teachers:
                model, files = teachers.files(plan, teacher, seed)
                argv += ["--teachers", str(model)]
                inputs += files
            if model := language_models.of(plan, name):
                argv += ["--language_model", str(model[0])]
                inputs += model[1]
            if verdict.taught:
                mode = plan.teacher_mode or run.teacher_mode
                argv += ["--teacher_mode", mode] if mode != run.teacher_mode else []
                if mode == "stored":
                    job = teachers.label(plan, name, seed)
                    argv += ["--teacher_store", str(job.log.parent)]
                    inputs += job.outputs
                    if job.name not in labelling:  # runs that ask the same share what is said
                        labelling.add(job.name)
                        yield job
            job = Job(
                f"train {name} seed {seed}", (*argv, "--resume", "true"), folder / "train.log",
                gpus=plan.ngpu, inputs=tuple(inputs), outputs=(folder / "config.yaml",),
                resumes=folder / "checkpoint.pth", cpus=plan.num_processes,
            )  # fmt: skip
            yield job
            source = ["--source", options.export] if options.export else []
            argv = ["python3", "-m", "espnet_pl.bridge.export", "--exp", str(folder)]
            yield Job(
                f"export {name} seed {seed}",
                (*argv, "--output", str(folder / "model"), *source), folder / "export.log",
                inputs=(job.marker, folder / "config.yaml"), outputs=_model(folder),
            )  # fmt: skip


def infer(plan: Plan) -> Iterator[Job]:
    """Recognise the test sets with stock ESPnet; nothing of ours runs here."""
    sizes = {}
    for test in plan.recipe.test:
        source = Path(f"data/{test}/wav.scp")
        sizes[test] = n = max(1, -(-len(parts.keys(source)) // PART)) if source.exists() else 1
        if n > 1:
            folder = Path(f"data/{test}/split{n}")
            argv = ("python3", "-m", "espnet_pl.recipe.parts", "split", str(source), str(n))
            outputs = tuple(folder / f"keys.{k}" for k in range(1, n + 1))
            log = folder / "split.log"
            yield Job(f"split {test}", (*argv, str(folder)), log, 0, (source,), outputs, here=True)
    for name, seed in plan.all_of():
        for test, n in sizes.items():
            yield from _infer_one(plan, name, seed, test, n)


def _infer_one(plan: Plan, name: str, seed: int, test: str, n: int) -> Iterator[Job]:
    folder, run = plan.dir(name, seed), plan.runs[name]
    model, decode = _model(folder), run.decode
    source, outputs = Path(f"data/{test}/wav.scp"), []
    for k in range(1, n + 1):
        key_file = Path(f"data/{test}/split{n}/keys.{k}") if n > 1 else source
        output = folder / "infer" / test / "logdir" / f"output.{k}"
        outputs.append(output / "1best_recog")
        argv = (
            "python3", "-m", f"espnet2.bin.{run.task}_inference", "--config", str(decode),
            "--asr_train_config", str(model[0]), "--asr_model_file", str(model[1]),
            "--data_path_and_name_and_type", f"{source},speech,sound", "--key_file", str(key_file),
            "--output_dir", str(output), "--ngpu", str(min(plan.ngpu, 1)), "--batch_size", "1",
        )  # fmt: skip
        which = f" part {k} of {n}" if n > 1 else ""
        yield Job(
            f"infer {name} {test} seed {seed}{which}", argv, output.with_name(f"infer.{k}.log"),
            gpus=min(plan.ngpu, 1), inputs=tuple(dict.fromkeys((decode, *model, source, key_file))),
            outputs=tuple(outputs[-1] / file for file in parts.FILES),
        )  # fmt: skip
    argv = ("python3", "-m", "espnet_pl.recipe.parts", "join", str(source))
    inputs = tuple(output / file for output in outputs for file in parts.FILES)
    folder = folder / "infer" / test
    yield Job(
        f"join {name} {test} seed {seed}", (*argv, str(folder), *map(str, outputs)),
        folder / "join.log", inputs=(source, *inputs), here=True,
        outputs=tuple(folder / file for file in parts.FILES),
    )  # fmt: skip


def results(plan: Plan) -> Path:
    """The table: in the recipe, one per model; a trial (another ``--expdir``) has its own."""
    if plan.is_trial:
        return plan.expdir / "RESULTS.md"
    return Path("RESULTS.md" if plan.asr == config.ASR else f"RESULTS_{plan.asr.stem}.md")


def measure(plan: Plan) -> Iterator[Job]:
    """Word error rates, intervals and recovery rates of all runs there are: RESULTS.md."""
    found = _measurable(plan)
    if not found:
        raise RecipeError("no run to measure; see the lines above")
    sets = plan.recipe.test
    inputs = [Path("recipe.yaml"), *(Path(f"data/{name}/text") for name in sets)]
    inputs += [path for name in sets if (path := Path(f"data/{name}/utt2spk")).exists()]
    for name, seed in found:
        folder = plan.dir(name, seed)
        inputs += [folder / "train.job.json", *(folder / "infer" / test / "text" for test in sets)]
    other = config.other_results(plan.recipe, plan.asr, plan.expdir)
    inputs += [other] if other else []
    words = [word for name, seed in found for word in ("--run", f"{name}:{seed}")]
    yield Job(
        "measure",
        ("python3", "-m", "espnet_pl.recipe.measure", "--asr_config", str(plan.asr),
         "--expdir", str(plan.expdir), "--output", str(results(plan)), *words),
        plan.expdir / "measure.log", inputs=tuple(inputs),
        outputs=(results(plan), plan.expdir / "results.json"), here=True,
    )  # fmt: skip


def _measurable(plan: Plan) -> list[tuple[str, int]]:
    """The chosen runs, and all others whose results are there and not older than their settings."""
    chosen = dict.fromkeys(plan.all_of())
    names = _unique(*plan.recipe.methods, *plan.runs)
    on_disk = {int(path.name[4:]) for path in plan.expdir.glob("seed*") if path.name[4:].isdigit()}
    for seed in sorted({1, *on_disk, *plan.seeds}):
        for name in names:
            if name not in plan.runs or not (plan.dir(name, seed) / "infer").exists():
                continue
            if not {*plan.runs[name].before} <= {*plan.runs}:  # there is a mistake in one
                continue
            own = replace(plan, chosen=(name,), seeds=(seed,))
            phases = {plan.dir(phase, seed) for phase in (*plan.runs[name].before, name)}
            jobs = [j for j in (*train(own), *infer(own)) if phases & {*j.log.parents}]
            old = [(job.name, job.why()) for job in jobs if job.why()]
            if old:
                chosen.pop((name, seed), None)
                print(f"left out of the table: {name} seed {seed} ({old[0][0]}: {old[0][1][0]})")
            else:
                chosen[name, seed] = None
    return sorted(chosen, key=lambda item: (names.index(item[0]), item[1]))


def pack_model(plan: Plan) -> Iterator[Job]:
    """Pack each model as ESPnet does; it loads where espnet_pl is not installed."""
    corpus = Path.cwd().parent.name
    for name, seed in plan.all_of():
        folder, options = plan.dir(name, seed), []
        if plan.runs[name].normalize == "global_mvn":
            options.append(folder / "model" / "feats_stats.npz")
        if plan.runs[name].options.token_type == "bpe":
            options.append(folder / "model" / "bpe.model")
        conf, weights = _model(folder)
        target = folder / f"{corpus}_{name}.zip"
        argv = ["python3", "-m", "espnet2.bin.pack", "asr", "--asr_train_config", str(conf)]
        argv += ["--asr_model_file", str(weights)]
        argv += [word for path in options for word in ("--option", str(path))]
        yield Job(
            f"pack {name} seed {seed}", (*argv, "--outpath", str(target)), folder / "pack.log",
            inputs=(conf, weights, *options), outputs=(target,),
        )  # fmt: skip


STAGES = (
    create_dataset, train_tokenizer, collect_stats, train_lm, train, infer, measure, pack_model,
)  # fmt: skip


def _training(plan: Plan, labelled: str, token_type: str) -> tuple[list[str], list[Path]]:
    """The part of a training command that statistics and training share, and its input files."""
    recipe = plan.recipe
    argv = ["python3", "-m", "espnet_pl.bridge.train", "--token_type", token_type]
    inputs = list(recipe.token_files(token_type))
    argv += ["--token_list", str(inputs[0])]
    argv += ["--bpemodel", str(inputs[1])] if inputs[1:] else []
    for part, name in (("train", labelled), ("valid", recipe.valid)):
        folder = Path("data") / name
        wav, text, shape = folder / "wav.scp", folder / "text", folder / "speech_shape"
        argv += [f"--{part}_data_path_and_name_and_type", f"{wav},speech,sound"]
        argv += [f"--{part}_data_path_and_name_and_type", f"{text},text,text"]
        argv += [f"--{part}_shape_file", str(shape)]
        inputs += [wav, text, shape]
    return [*argv, "--use_preprocessor", "true"], inputs


def _same_tokens(plan: Plan, run: Run, weights: Path) -> bool:
    """Whether the model that a run starts from has the run's tokens.

    Raises:
        RecipeError: one from elsewhere has not.
    """
    options = run.options
    if not is_path(options.init):
        return plan.runs[options.init].options.token_type == options.token_type
    tokens, conf = plan.recipe.token_files(options.token_type)[0], weights.with_name("config.yaml")
    if not tokens.exists():  # a dry run
        return True
    theirs = config.mapping(conf).get("token_list")
    if theirs != tokens.read_text(encoding="utf-8").splitlines():
        raise RecipeError(
            f"{run.files[1]}, recipe: init: {conf} has other tokens than {tokens}: take: encoder, "
            "for its encoder only; or put its tokens.txt (and bpe.model) there, with "
            "--skip_stages train_tokenizer"
        )
    return True


def _stats(plan: Plan) -> Path:
    return plan.expdir / "stats" / "train" / "feats_stats.npz"


def _model(folder: Path) -> tuple[Path, Path]:
    return folder / "model" / "config.yaml", folder / "model" / "model.pth"


def _unique(*names: str | None) -> list[str]:
    return [name for name in dict.fromkeys(names) if name]


if __name__ == "__main__":
    from espnet_pl.recipe import cli

    sys.exit(cli.main(sys.argv[1:]))
