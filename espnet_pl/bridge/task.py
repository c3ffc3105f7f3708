"""ESPnet's recognition tasks, trained by a method: some options more, nothing re-typed."""

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from espnet2.tasks.abs_task import AbsTask
from espnet2.tasks.asr import ASRTask
from espnet2.tasks.asr_transducer import ASRTransducerTask
from espnet2.utils.nested_dict_action import NestedDictAction

from espnet_pl.bridge.batches import PairedIterFactory
from espnet_pl.bridge.model import PLModel, attach
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.transducer import TransducerRecogniser
from espnet_pl.methods.base import ConfigError, build, config_of, module_of, unknown

# What a configuration of ours has beyond a stock one; taken out of exported models.
OPTIONS = (
    "task",
    "method",
    "method_conf",
    "unlabelled_data_path_and_name_and_type",
    "unlabelled_shape_file",
    "truth",
    "teachers",
)


class _Learning:
    """What every task of ours adds to the stock task that it is mixed into."""

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
            help="folder of an exported model (config.yaml, model.pth) that labels beside the "
            "method's own teacher; may be given several times",
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
        try:
            net = super().build_model(args)
        except ModuleNotFoundError as error:
            if error.name != "warprnnt_pytorch":
                raise
            raise ConfigError(
                f"decoder: {args.decoder} of task asr needs the module warprnnt_pytorch, for "
                "decoding too: tools/install_warprnnt.sh installs one that is not compiled. "
                "Transducers of task asr_transducer do without"
            ) from None
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
        resources = {"truth": cls._read_truth(args), "teachers": cls._read_teachers(args)}
        _Learning.built = PLModel(student, build(args.method, args.method_conf, student, resources))
        return _Learning.built

    @classmethod
    def build_optimizers(cls, args: argparse.Namespace, model: PLModel):
        """The stock optimisers of the student; the method follows the first one."""
        method, model.method = model.method, None  # its copies are never optimised
        optimizers = super().build_optimizers(args, model)
        model.method = method
        attach(optimizers[0], model)
        return optimizers

    @classmethod
    def build_iter_factory(cls, args, distributed_option, mode, kwargs=None):
        """For training: labelled and unlabelled batches as the method wants them."""
        factory = super().build_iter_factory(args, distributed_option, mode, kwargs)
        if mode != "train" or not cls.with_text:
            return factory
        if args.iterator_type != "sequence":
            raise ConfigError(
                f"iterator_type is {args.iterator_type!r}; pairs are made of 'sequence' only"
            )
        pairing = module_of(args.method).Method.pairing(config_of(args.method, args.method_conf))
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
            unlabelled = without_text.build_iter_factory(theirs, distributed_option, mode, kwargs)
        chance = None if pairing.replace_when == "random" else _Learning.built.method.chance
        return PairedIterFactory(
            pairing, factory, unlabelled, args.num_iters_per_epoch, args.seed, chance
        )

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """The stock ones; of unlabelled speech no text."""
        return super().required_data_names(train, inference or not cls.with_text)

    @classmethod
    def _read_teachers(cls, args: argparse.Namespace) -> list[Recogniser]:
        teachers = []
        for folder in map(Path, [] if args.collect_stats else args.teachers):
            files = [folder / "config.yaml", folder / "model.pth"]
            for file in files:
                if not file.is_file():
                    raise ConfigError(f"teachers: {file} is missing; give an exported model folder")
            net, theirs = cls.stock.build_model_from_file(*files, "cpu")
            if list(theirs.token_list) != list(args.token_list):
                raise ConfigError(
                    f"teachers: {folder} has other tokens than --token_list; train it with these"
                )
            teachers.append(cls.student(net).eval().requires_grad_(False))
        return teachers

    @classmethod
    def _read_truth(cls, args: argparse.Namespace) -> dict[str, list[int]]:
        if not args.truth or args.collect_stats:
            return {}
        tokenise = cls.build_preprocess_fn(args, train=False)
        truth = {}
        for line in Path(args.truth).read_text(encoding="utf-8").splitlines():
            utt_id, _, text = line.partition(" ")
            truth[utt_id] = tokenise(utt_id, {"text": text})["text"].tolist()
        return truth


class PLTask(_Learning, ASRTask):
    """Attention/CTC and pure CTC models."""

    stock, student = ASRTask, Recogniser


class PLTransducerTask(_Learning, ASRTransducerTask):
    """Transducers; their loss is ours, so that nothing has to be compiled."""

    stock, student = ASRTransducerTask, TransducerRecogniser


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
