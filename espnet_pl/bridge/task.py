"""ESPnet's recognition tasks, trained by a method: some options more, nothing re-typed."""

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from espnet2.tasks.abs_task import AbsTask
from espnet2.tasks.asr import ASRTask
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.utils.nested_dict_action import NestedDictAction

from espnet_pl.bridge import batching, language_models, teachers, teaching
from espnet_pl.bridge.batches import PairedIterFactory
from espnet_pl.bridge.model import PLModel, attach
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.trainer import PLTrainer, check_criterion
from espnet_pl.methods.base import ConfigError, Method
from espnet_pl.methods.registry import build, config_of, module_of, unknown

# What a configuration of ours has beyond a stock one; taken out of exported models.
OPTIONS = (
    "task",
    "method",
    "method_conf",
    "unlabelled_data_path_and_name_and_type",
    "unlabelled_shape_file",
    "truth",
    "teachers",
    "teacher_mode",
    "teacher_store",
    "language_model",
    "batching",
    "batching_conf",
    "batching_labels",
    "save_interval",
    "num_processes",
)


class _Learning:
    """What every task of ours adds to the stock task that it is mixed into."""

    trainer = PLTrainer
    stock: type[AbsTask]  # reads and writes the same models
    student: type[Recogniser]
    with_text = True  # False for the task of the unlabelled speech
    # The last model built: ESPnet builds the iterator after it, and gives it the options only.
    built: ClassVar[PLModel | None] = None

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Stock options, and ours."""
        super().add_task_arguments(parser)
        group = parser.add_argument_group("Learning from unlabelled speech")
        group.add_argument("--task", choices=[*TASKS], help="of ESPnet: the family of models")
        group.add_argument(
            "--method",
            default="supervised",
            help="a file in espnet_pl/methods, or the dotted path of a module",
        )
        group.add_argument(
            "--method_conf", action=NestedDictAction, default={}, help="fields of its Config"
        )
        group.add_argument(
            "--unlabelled_data_path_and_name_and_type",
            action="append",
            default=[],
            type=lambda s: tuple(s.split(",")) if isinstance(s, str) else tuple(s),
            help="as --train_data_path_and_name_and_type, without text",
        )
        group.add_argument("--unlabelled_shape_file", action="append", default=[])
        group.add_argument(
            "--truth",
            help="a text file with held-back transcripts of unlabelled utterances: they are "
            "compared with the pseudo-labels, logged, and never trained on",
        )
        group.add_argument(
            "--teachers",
            action="append",
            default=[],
            help="folder of an exported model (config.yaml, model.pth), or a zip of "
            "espnet2.bin.pack: it labels beside the method's own teacher, and there may be "
            "several; or it is the one that the method learns from",
        )
        group.add_argument(
            "--teacher_mode",
            choices=teaching.MODES,
            default="stored",
            help="of a method that learns from one teacher: it is asked in training (online), or "
            "what it said is read (stored)",
        )
        group.add_argument(
            "--teacher_store",
            help="folder with what the teacher said, made by espnet_pl.bridge.label",
        )
        group.add_argument(
            "--language_model",
            help="of a method that uses one: a folder of espnet2.bin.lm_train, or n-grams: .arpa "
            "(text), .bin (KenLM)",
        )
        group.add_argument(
            "--num_processes",
            type=int,
            default=1,
            help="that train together on the CPUs of this machine, each on its share of a batch; "
            "of GPUs, --ngpu says how many",
        )
        group.add_argument(
            "--batching",
            choices=batching.KINDS,
            default="random",
            help="label_aware: batches in which every drawn label is there twice",
        )
        group.add_argument(
            "--batching_conf",
            action=NestedDictAction,
            default={},
            help="fields of espnet_pl.data.label_aware.Batching: power, order, stream",
        )
        group.add_argument(
            "--batching_labels",
            help="a text file, 'utterance-id token token …': what is in the unlabelled speech, "
            "where the method has no stored records of a teacher that say it",
        )
        group.add_argument(
            "--save_interval",
            default="10min",
            help="how much work may be lost: a number of updates, or a time (10min, 30s); a "
            "checkpoint is also written at the end of each epoch, and on SIGTERM, SIGUSR1, SIGUSR2",
        )
        # One criterion: 202511 averages wrongly with several (compat.py).  No plots and no
        # tensorboard unless asked for: both need packages that training does not.
        parser.set_defaults(
            best_model_criterion=[("valid", "loss", "min")],
            use_matplotlib=False,
            use_tensorboard=False,
            num_att_plot=0,
        )

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> PLModel:
        """The stock model of the stock options, inside a ``PLModel``."""
        net = teachers.build_net(cls.stock, args)
        # ESPnet looks for these names after building, where they have our prefix.
        for prefix in args.freeze_param:
            mine = [
                p for n, p in net.named_parameters() if n == prefix or n.startswith(prefix + ".")
            ]
            if not mine:
                raise ConfigError(f"freeze_param: the model has no parameter {prefix!r}")
            for parameter in mine:
                parameter.requires_grad = False
        student = cls.student(net)
        method = cls._build_method(args, student)
        if getattr(args, "distributed", False) and method.pairing(method.config).unlabelled:
            # Batches in turn, or of one kind only, leave layers without a gradient: of a decoder,
            # or of what the method learns.  Unless DDP looks for these, it fails.
            args.unused_parameters = True
        _Learning.built = PLModel(student, method)
        return _Learning.built

    @classmethod
    def build_optimizers(cls, args: argparse.Namespace, model: PLModel):
        """The stock optimisers of the student; the first one has what the method learns, too.

        The method follows it.
        """
        method, model.method = model.method, None  # its copies are never optimised
        optimizers = super().build_optimizers(args, model)
        model.method = method
        if own := method.learns():
            optimizers[0].add_param_group({"params": own})
        attach(optimizers[0], model)
        return optimizers

    @classmethod
    def build_iter_factory(cls, args, distributed_option, mode, kwargs=None):
        """For training: labelled and unlabelled batches as the method wants them."""
        if mode != "train" or not cls.with_text:
            return super().build_iter_factory(args, distributed_option, mode, kwargs)
        if args.iterator_type != "sequence":
            raise ConfigError(
                f"iterator_type is {args.iterator_type!r}; pairs are made of 'sequence' only"
            )
        pairing = module_of(args.method).Method.pairing(config_of(args.method, args.method_conf))
        aware = batching.streams(args, pairing)
        # Of label-aware batches each rank takes its share later, of speech that it all has.
        own = {kind: {**(kwargs or {}), "distributed": False} for kind in aware}
        labelled = super().build_iter_factory(
            args, distributed_option, mode, own.get("labelled", kwargs)
        )
        unlabelled = None
        if pairing.unlabelled:
            if not args.unlabelled_data_path_and_name_and_type:
                raise ConfigError(
                    f"method {args.method} needs unlabelled speech: "
                    "--unlabelled_data_path_and_name_and_type and --unlabelled_shape_file"
                )
            theirs = copy.copy(args)
            theirs.train_data_path_and_name_and_type = args.unlabelled_data_path_and_name_and_type
            theirs.train_shape_file = args.unlabelled_shape_file
            theirs.num_iters_per_epoch = None
            without_text = type(cls.__name__, (cls,), {"with_text": False})
            unlabelled = without_text.build_iter_factory(
                theirs, distributed_option, mode, own.get("unlabelled", kwargs)
            )
        method = _Learning.built.method
        for kind in aware:
            factory = labelled if kind == "labelled" else unlabelled
            tokenise, several = cls._tokeniser(args), distributed_option.distributed
            batching.fill(factory, kind, args, several, tokenise, method)
        chance = None if pairing.replace_when == "random" else method.chance
        return PairedIterFactory(
            pairing, labelled, unlabelled, args.num_iters_per_epoch, args.seed, chance
        )

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """The stock ones; of unlabelled speech no text."""
        return super().required_data_names(train, inference or not cls.with_text)

    @classmethod
    def _build_method(cls, args: argparse.Namespace, student: Recogniser) -> Method:
        if args.collect_stats:  # of features: what a method needs may not be there yet
            return build("supervised", {}, student)
        resources = {"truth": cls._read_truth(args)}
        if teaching.is_taught(vars(args)):
            resources |= teaching.resources(args, student, cls._tokeniser(args))
        else:
            resources["teachers"] = cls._read_teachers(args)
        if args.language_model:
            device = "cuda" if args.ngpu > 0 else "cpu"
            resources["language_model"] = language_models.load(
                args.language_model, args.token_list, device
            )
        method = build(args.method, args.method_conf, student, resources)
        check_criterion(args, method)
        return method

    @classmethod
    def _read_teachers(cls, args: argparse.Namespace) -> list[Recogniser]:
        found = []
        for path in args.teachers:
            teacher = teachers.load(path)
            if teacher.tokens.token_list != list(args.token_list):
                raise ConfigError(
                    f"teachers: {path} has other tokens than --token_list; train it with these"
                )
            found.append(teacher.network)
        return found

    @classmethod
    def _read_truth(cls, args: argparse.Namespace) -> dict[str, list[int]]:
        if not args.truth:
            return {}
        tokenise, truth = cls._tokeniser(args), {}
        for line in Path(args.truth).read_text(encoding="utf-8").splitlines():
            utt_id, _, text = line.partition(" ")
            truth[utt_id] = tokenise(text)
        return truth

    @classmethod
    def _tokeniser(cls, args: argparse.Namespace) -> Callable[[str], list[int]]:
        """From text to labels, as in training."""
        prepare = cls.build_preprocess_fn(args, train=False)
        return lambda text: prepare("", {"text": text})["text"].tolist()


class PLTask(_Learning, ASRTask):
    """Attention/CTC and pure CTC models."""

    stock, student = teachers.FAMILIES["asr"]


class PLTransducerTask(_Learning, ASRTransducerTask):
    """Transducers; their loss is ours, so that nothing has to be compiled."""

    stock, student = teachers.FAMILIES["asr_transducer"]


TASKS = {"asr": PLTask, "asr_transducer": PLTransducerTask}


def task_of(config: Mapping[str, Any]) -> type[_Learning]:
    """The task that a configuration names; ``asr`` if it names none.

    Raises:
        ConfigError: there is none of that name.
    """
    name = config.get("task") or "asr"
    if name not in TASKS:
        raise ConfigError(unknown("task", name, TASKS))
    return TASKS[name]
