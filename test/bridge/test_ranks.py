"""Every method in two processes: the same update as in one, and what happens if one has nothing.

Two ranks share out the batches that one rank has whole.  So that this can be compared, nothing is
random (``ranks._same_draws``), all speech is of one length, for ESPnet's front end hears the
padding of a batch, and no layer normalises over a batch: batch normalisation would see that of its
own rank, in stock ESPnet, too.
"""

import numpy as np
import pytest
import torch
import yaml
from espnet2.train.distributed_utils import free_port

from espnet_pl.methods.registry import config_of, methods, module_of
from test.bridge.conftest import ASR, DECODER, TRANSDUCER, make_corpus
from test.bridge.models import arpa_file, model_folder
from test.bridge.ranks import Broken, Ranks, started_by, train
from test.bridge.test_train import weights

NO_DROPOUT = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0}
STEADY = {
    "specaug": None,
    "optim": "sgd",
    "optim_conf": {"lr": 0.001},
    "grad_clip": 1e9,  # which hides a wrong factor
    "batch_type": "unsorted",
    "batch_size": 3,  # of eight utterances: batches of three and two, so halves of two and one
    "num_iters_per_epoch": 6,
    "max_epoch": 1,
}
CTC = {
    **ASR,
    **STEADY,
    "encoder": "transformer",
    "encoder_conf": {
        "output_size": 8,
        "attention_heads": 2,
        "linear_units": 8,
        "num_blocks": 1,
        "attention_dropout_rate": 0.0,
        **NO_DROPOUT,
    },
}
QUIET = {f"{whose}_attention_dropout_rate": 0.0 for whose in ("self", "src")} | NO_DROPOUT
ATTENTION = {
    **CTC,
    **DECODER,
    "decoder_conf": DECODER["decoder_conf"] | QUIET,
    "model_conf": {"ctc_weight": 0.3},
}
BRANCHES = {"block_type": "branchformer", "linear_size": 8, "hidden_size": 8, "heads": 2}
BODY = {"body_conf": [BRANCHES | {"conv_mod_kernel_size": 3}]}
PARTS = TRANSDUCER["encoder_conf"] | BODY
STUDENTS = {
    "ctc": CTC,
    "attention": ATTENTION,
    "transducer": TRANSDUCER | STEADY | {"encoder_conf": PARTS},
}

CACHE = {"capacity": 2, "unlabelled": 2, "replace": 0.5}
NODES = dict.fromkeys(("collapsed", "one_best", "full_lattice", "ranking", "discriminative"), 0.5)
SOFT = {"soft": 0.5, "lattice": 0.5, "sequences": 0.5, "token_entropy": 0.5, "frame_entropy": 0.1}
SURE = {"confidence": "weight", "teacher": "ema", "decay": 0.5}
SMALL = {"hidden": 8, "out": 4, "units": "argmax", "blank": "keep"}
BLJUST = {"out": 4, "codes": 8, "steps": 3, "explore": 1, "joint": 2, "least_heard": 0.3}
BLJUST |= {"gamma": 0.1, "growth": 0.2, "norms_every": 1}
SPANS = {"hide": "spans", "predict": "codes", "span": 12, "share_hidden": 0.5}
ANY = {"length_band": None, "unlabelled": 2, "beam": 2}
CASES = {
    "supervised": ("supervised", "attention", {}),
    "slimipl": ("slimipl", "ctc", CACHE | {"teacher": "ema", "decay": 0.5}),
    "slimipl live": ("slimipl", "attention", CACHE | {"replace_when": "changed"}),
    "slimipl, soft": ("slimipl", "ctc", CACHE | SOFT | SURE),
    "slimipl, transducer": ("slimipl", "transducer", CACHE),
    "mpl": ("mpl", "attention", {"remaining": 0.5, "horizon": 2}),
    "iterative": ("iterative", "transducer", {"round_steps": 2}),
    "transducer_kd": ("transducer_kd", "transducer", NODES | {"beam": 2}),
    "transducer_kd, ctc": ("transducer_kd", "ctc", {"beam": 2, "hard": 1.0}),
    "csl": ("csl", "ctc", SMALL | {"labelled": 1}),
    "csl, batch": ("csl", "attention", SMALL | {"negatives": "batch", "denominator": "one"}),
    "csl, alternate": ("csl", "transducer", SMALL | {"alternate": True}),
    "csl, label-aware": ("csl", "ctc", SMALL | {"labelled": 1}),
    "ce_pl": ("ce_pl", "ctc", {"beam": 2, "labelled": 1}),
    "lpm": ("lpm", "ctc", ANY),
    "lpm, attention": ("lpm", "attention", ANY | {"proposal": "ema", "decay": 0.5}),
    "lpm, transducer": ("lpm", "transducer", ANY | {"direction": "reversed"}),
    "bljust": ("bljust", "ctc", BLJUST),
    "bljust, batch": ("bljust", "attention", BLJUST | {"negatives": "batch"}),
    "bljust, codes": ("bljust", "transducer", BLJUST | SPANS),
    "bljust_pl": ("bljust_pl", "ctc", {"explore": 1, "joint": 2, "gamma": 0.1, "growth": 0.2}),
}
CASES |= {name: (name, "ctc", {}) for name in methods() if name not in CASES}  # a new one
# What is the same on all ranks, of what a method knows; and what must have changed in the end.
SHARED_STATE = (
    "step", "teacher", "evolution", "projection", "prediction", "predictor", "embedding", "joint",
    "turn", "best", "replaced", "alarms", "put_back",
)  # fmt: skip
MOVES = {
    "csl": ["projection.0.weight", "projection.2.bias"],
    "csl, batch": ["projection.0.weight", "projection.2.bias"],
    "csl, alternate": ["projection.0.weight", "prediction.weight"],
    "ce_pl": ["prediction.weight"],
    "lpm": ["best", "replaced"],
    "bljust": ["predictor.weight", "embedding.weight", "joint"],
    "bljust, batch": ["predictor.weight", "embedding.weight", "joint"],
    "bljust, codes": ["predictor.weight", "joint"],
    "bljust_pl": ["joint"],
}
NORMS = "gradient_upper", "gradient_lower", "gradient_cosine", "gamma"
LOGGED = {
    "bljust": NORMS,
    "bljust, batch": NORMS,
    "bljust_pl": ["gamma", "pseudo"],
    "csl": ["contrastive", "segments", "positives"],
    "slimipl, soft": ["pseudo", "pseudo_soft", "pseudo_token_entropy"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """As the one of ``conftest``, of utterances of the same length."""

    def sound(rng):
        pitch = rng.choice([300, 900, 2000, 3500], 4).repeat(1000)  # labels shall meet
        tones = np.sin(2 * np.pi * pitch * np.arange(4000) / 8000)
        return 0.3 * tones + 0.03 * rng.standard_normal(4000)

    return make_corpus(tmp_path_factory.mktemp("corpus"), 8, sound)


@pytest.fixture(scope="module")
def ranks():
    both = Ranks()
    yield both
    both.end()


@pytest.fixture
def command(arguments, corpus, tmp_path):
    """The command of a case, and the weights that it starts from."""

    def make(case, out, **changes):
        method, student, conf = CASES.get(case) or case
        seed = tmp_path / f"seed_{student}"
        if not seed.exists():
            model_folder(seed, student, **STUDENTS[student])
        if method == "csl":
            changes = {"optim_conf": {"lr": 0.1}, **changes}  # it asks for little
        if case == "csl, label-aware":
            conf_of_batching = {"batching_conf": {"stream": "both"}, "batch_size": 4}
            changes = {"batching": "label_aware", **conf_of_batching, **changes}
        argv = arguments(method, out, conf, base=STUDENTS[student] | changes)
        argv += ["--init_param", str(seed / "model.pth"), "--log_level", "ERROR"]
        if "batching" in changes:
            argv += ["--batching_labels", str(corpus / "data/unlabelled/truth")]
        kind = module_of(method).Method
        if "language_model" in kind.needs(config_of(method, conf)):
            argv += ["--language_model", str(arpa_file(tmp_path / "lm.arpa"))]
        if kind.taught:
            other = "transducer" if case == "transducer_kd" else "attention"
            teacher = model_folder(tmp_path / "teacher", other, seed=1)
            argv += ["--teachers", str(teacher), "--teacher_mode", "online"]
        return argv, weights(seed / "model.pth")

    return make


@pytest.fixture
def both(ranks, tmp_path):
    """Train in two processes: what they know in the end."""

    def call(argv, harm=None):
        (tmp_path / "rendezvous").unlink(missing_ok=True)
        return together(ranks(train, argv, str(tmp_path / "rendezvous"), harm))

    return call


def together(found):
    """What both say, if they are the same student, and nothing is wrong."""
    assert not [x for x in found if isinstance(x, Broken)], "\n".join(map(str, found))
    first, second = found
    assert first["step"] == second["step"]
    for name, value in first["student"].items():
        assert value.isfinite().all() and torch.equal(value, second["student"][name]), name
    return first, second


def assert_alike(one, two, start, share=2e-3):
    """Of each parameter, the change is the same, but for a small share of it."""
    for name, value in one.items():
        if not value.is_floating_point() or torch.equal(value, two[name]):
            assert torch.equal(value, two[name]), name
            continue
        first = start[name] if start[name].shape == value.shape else 0.0
        moved, apart = (value - first).abs().max(), (value - two[name]).abs().max()
        assert apart <= share * moved + 1e-6, (name, float(apart), float(moved))


def logged(folder, epoch=1):
    """What ESPnet reports of a training epoch."""
    return weights(folder / "checkpoint.pth")["reporter"]["stats"][epoch]["train"]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_updates_of_one(case, both, command, tmp_path):
    epochs = {"max_epoch": 2} if case == "lpm" else {}
    argv, start = command(case, "one", **epochs)
    one = train(0, 1, argv, None)
    first, second = both(command(case, "two", **epochs)[0])
    assert one["step"] == first["step"] == 6 * epochs.get("max_epoch", 1)
    moved = [(one["student"][name] - value).abs().max() for name, value in start.items()]
    assert max(moved) > 1e-3
    assert_alike(one["student"], first["student"], start)
    # What a method knows besides: teachers are averages of the student, or begin as it does.
    of_teacher = "teacher._average.module.net."
    begun = one["begun"] | {of_teacher + name: value for name, value in start.items()}
    kept = [name for name in one["method"] if name.split(".")[0] in SHARED_STATE]
    assert_alike(*({k: rank["method"][k] for k in kept} for rank in (one, first)), begun)
    for name in kept:
        assert torch.equal(first["method"][name], second["method"][name]), name
    for name in MOVES.get(case, ()):
        assert not torch.equal(one["method"][name], begun[name]), name
    a, b = logged(tmp_path / "one"), logged(tmp_path / "two")
    for name in ("loss", *LOGGED.get(case, ())):
        assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_each_rank_labels_its_own_speech_and_the_checkpoint_has_all(both, command):
    found = both(command("slimipl", "exp")[0])
    cached, alone = found[0]["method"], found[1]["method"]
    ids = [bytes(x["cache._extra_state.id_bytes"].tolist()).decode() for x in (cached, alone)]
    assert ids[0] == ids[1] and ids[0].count("unlabelled") >= 6
    # Without a cache that is kept, who labels has it to himself.
    found = both(command("mpl", "other")[0])
    ids = [bytes(x["method"]["cache._extra_state.id_bytes"].tolist()).decode() for x in found]
    split = [{f"unlabelled{k}" for k in x.split("unlabelled")[1:]} for x in ids]
    assert split[0] and split[1] and not split[0] & split[1]


@pytest.mark.parametrize(
    "case, harm",
    [
        ("slimipl, soft", "silent_teacher"),
        ("slimipl, transducer", "silent_teacher"),
        ("mpl", "silent_teacher"),
        ("mpl", "silent_teachers"),
        ("lpm", "silent_teacher"),
        ("csl", "no_segments"),
        ("csl, batch", "no_segments"),
    ],
)
def test_a_rank_that_has_nothing_to_learn_goes_along(case, harm, both, command):
    first, _ = both(command(case, "exp")[0], harm)
    assert first["step"] == 6


def test_what_is_no_number_on_one_rank_is_an_update_of_none(both, command):
    found = both(command("slimipl live", "exp")[0], "nan_in_the_second_labelled_batch")
    assert [rank["step"] for rank in found] == [5, 5]
    assert len({len(rank["method"]["evolution._extra_state"]) for rank in found}) == 1


def test_layers_without_a_gradient_need_no_word_of_the_user(both, command, tmp_path):
    both(command("csl, batch", "exp", num_iters_per_epoch=2)[0])
    for out, used in (("exp", True), ("alone", False)):
        if out == "alone":
            train(0, 1, command("csl, batch", out, num_iters_per_epoch=1)[0], None)
        written = yaml.safe_load((tmp_path / out / "config.yaml").read_text())
        assert written["unused_parameters"] == used


@pytest.mark.parametrize("who", ["srun", "torchrun"])
def test_ranks_that_something_else_has_started(who, ranks, command, tmp_path):
    argv = command("ce_pl", "exp", num_iters_per_epoch=2)[0]
    first, _ = together(ranks(started_by, who, argv, free_port()))
    assert first["step"] == 2
    assert yaml.safe_load((tmp_path / "exp/config.yaml").read_text())["dist_backend"] == "gloo"
