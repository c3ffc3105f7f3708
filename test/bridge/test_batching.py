"""bridge/batching: label-aware batches through ESPnet's trainer, from each source of labels."""

import math

import pytest
import torch
import yaml

from espnet_pl.bridge import label, model
from espnet_pl.bridge.batches import PairedIterFactory
from espnet_pl.bridge.batching import of_text
from espnet_pl.bridge.export import export
from espnet_pl.bridge.train import ConfigError, load_config, main
from espnet_pl.data.label_aware import Batching, LabelAwareBatches
from espnet_pl.data.pairing import Pairing
from espnet_pl.methods.transducer_kd import Method as TransducerKD
from espnet_pl.parts.store import Reader
from test.bridge.models import model_folder
from test.bridge.test_distributed import Stream, two_ranks
from test.bridge.test_train import same, weights

AWARE = {"batching": "label_aware", "batching_conf": {"order": 2, "stream": "both"}}
BINS = 24000  # of the neighbours' configuration


@pytest.fixture
def seen(monkeypatch):
    """The utterances of each update, as the model gets them: labelled, unlabelled."""
    updates, to_batch = [], model.to_batch

    def spy(flat):
        batch = to_batch(flat)
        kinds = (batch.labelled, batch.unlabelled)
        updates.append(tuple(x.utt_id if x is not None else None for x in kinds))
        return batch

    monkeypatch.setattr(model, "to_batch", spy)
    return updates


def lines(path):
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines())


def expected(corpus, name, tokens, n, kind="unlabelled", order=2):
    """What the first n batches should be."""
    sizes = {u: int(samples) for u, samples in lines(corpus / f"data/{name}/speech_shape").items()}
    # So many batches has a pass at random: utterances by length, until it is too much.
    of_a_pass, batch = 0, []
    for size in sorted(sizes.values()):
        batch.append(size)
        if len(batch) * size > BINS:
            of_a_pass, batch = of_a_pass + 1, []
    of_a_pass += bool(batch)
    seed, tokens = f"{kind} 0", tokens.items()
    made = LabelAwareBatches(Batching(order=order), tokens, sizes, BINS, of_a_pass, seed)
    return [made[i] for i in range(n)]


def test_a_method_trains_on_label_aware_batches_and_its_model_is_stock(
    arguments, corpus, tmp_path, seen, caplog
):
    caplog.set_level("INFO")
    truth = corpus / "data/unlabelled/truth"
    argv = arguments("mpl", max_epoch=1, num_iters_per_epoch=12, keep_nbest_models=1, **AWARE)
    main([*argv, "--batching_labels", str(truth)])
    for place, (kind, name, file) in enumerate(
        [("labelled", "labelled", "text"), ("unlabelled", "unlabelled", "truth")]
    ):
        tokens = {u: t.split() for u, t in lines(corpus / f"data/{name}/{file}").items()}
        found = [update[place] for update in seen if update[place] is not None]
        assert len(found) >= 6  # more than a pass
        assert found == expected(corpus, name, tokens, len(found), kind)
        assert f"label-aware batches of {kind} speech: " in caplog.text
    exp = tmp_path / "exp"
    export(exp, exp / "model")
    config = yaml.safe_load((exp / "model/config.yaml").read_text())
    assert not [key for key in config if key.startswith("batching")]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restart_continues_bit_by_bit(workers, arguments, corpus, tmp_path):
    truth = ["--batching_labels", str(corpus / "data/unlabelled/truth")]
    changes = dict(num_workers=workers, **AWARE)
    main([*arguments("mpl", "whole", max_epoch=3, **changes), *truth])
    main([*arguments("mpl", "parts", max_epoch=1, **changes), *truth])
    main([*arguments("mpl", "parts", max_epoch=3, **changes), *truth, "--resume", "true"])
    whole, parts = (weights(tmp_path / d / "checkpoint.pth") for d in ("whole", "parts"))
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])
    main([*arguments("mpl", "random", max_epoch=3, num_workers=workers)])
    assert not same(weights(tmp_path / "random/checkpoint.pth")["model"], whole["model"])


def test_labels_come_from_the_records_of_a_teacher(arguments, corpus, tmp_path, seen):
    data = corpus / "data/unlabelled"
    changes = {"batching": "label_aware", "batching_conf": {"order": 1}}
    argv = arguments("transducer_kd", method_conf={"labelled": 0}, max_epoch=1, **changes)
    argv += ["--teachers", str(model_folder(tmp_path / "teacher", seed=1))]
    words = [*argv[:4], "--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "said")]
    label.main([*words, "--wav", str(data / "wav.scp"), "--shape", str(data / "speech_shape")])
    main([*argv, "--teacher_store", str(tmp_path / "said")])
    records = Reader(tmp_path / "said")
    tokens = {
        utt_id: TransducerKD.labels_of(None, records.get(utt_id))
        for utt_id in lines(data / "wav.scp")
    }
    assert any(tokens.values()) and len({tuple(said) for said in tokens.values()}) > 1
    assert [ids for _, ids in seen] == expected(corpus, "unlabelled", tokens, 5, order=1)
    with pytest.raises(ConfigError, match="transducer_kd has no stored records; give"):
        main([*argv, "--teacher_mode", "online"])


def test_a_method_that_does_not_say_what_is_in_its_records_is_refused(arguments, corpus, tmp_path):
    data = corpus / "data/unlabelled"
    argv = arguments("test.bridge.taught", max_epoch=1, batching="label_aware")
    argv += ["--teachers", str(model_folder(tmp_path / "teacher"))]
    words = [*argv[:4], "--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "said")]
    label.main([*words, "--wav", str(data / "wav.scp"), "--shape", str(data / "speech_shape")])
    with pytest.raises(ConfigError, match="taught does not say what is in its records; give"):
        main([*argv, "--teacher_store", str(tmp_path / "said")])


def test_two_ranks_train_together_to_the_end(arguments, corpus, tmp_path):
    argv = arguments("mpl", max_epoch=1, batch_bins=22000, **AWARE)
    truth = ["--batching_labels", str(corpus / "data/unlabelled/truth")]
    results = two_ranks(argv, tmp_path, truth)
    assert [code for _, code in results] == [0, 0], results[0][0][-2000:]
    saved = weights(tmp_path / "exp/checkpoint.pth")
    assert saved["optimizers"][0]["method"]["step"] == 5
    assert all(v.isfinite().all() for v in saved["model"].values() if v.is_floating_point())
    said = [line for line in results[0][0].splitlines() if "label-aware batches of" in line]
    # A pair for each rank: more utterances are too long than for one.
    assert len(said) == 2 and all("because 4 of their length do not fit" in line for line in said)


def factories(ranks=1, **changes):
    """Of each rank, over streams of which the unlabelled one is label-aware."""
    tokens = {f"u{i}": f"{i % 7} {i % 5}".split() for i in range(40)}
    labelled = [[f"l{b}{i}" for i in range(2 * ranks)] for b in range(5)]
    for rank in range(ranks):
        theirs = Stream([list(tokens)])
        sizes = dict.fromkeys(tokens, 1)
        theirs.sampler.batches = LabelAwareBatches(
            Batching(), tokens.items(), sizes, 12, 4, rank=rank, ranks=ranks
        )
        mine = Stream([batch[rank::ranks] for batch in labelled])
        yield PairedIterFactory(Pairing(labelled=1, unlabelled=2), mine, theirs, 9, seed=3)


def epochs(factory, numbers):
    return [[flat for _, flat in factory.build_iter(n)] for n in numbers]


def test_an_epoch_begins_where_the_last_one_ended_also_in_a_new_process():
    (running,), (new,) = factories(), factories()
    whole = epochs(running, (1, 2, 3))
    assert epochs(new, (3,)) == whole[2:]
    ids = [tuple(f["unlabelled_utt_id"]) for e in whole for f in e if "unlabelled_utt_id" in f]
    assert len(ids) == 18 and len(set(ids)) == 18  # four and a half passes, none like another


def test_ranks_take_the_same_steps_on_different_utterances():
    several = [epochs(factory, (1, 2)) for factory in factories(ranks=2)]
    for a, b in zip(*(sum(own, []) for own in several)):
        assert a.keys() == b.keys()
        for kind in (key for key in a if key.endswith("utt_id")):
            assert a[kind] and not set(a[kind]) & set(b[kind])


def test_an_epoch_without_a_length_of_its_own_is_a_pass_of_as_many_batches(arguments, corpus, seen):
    changes = {"batching": "label_aware", "batching_conf": {"stream": "labelled"}}
    argv = arguments("supervised", max_epoch=1, num_iters_per_epoch=None, **changes)
    main(argv)
    random = math.ceil(8 / 5)  # five of 4000 to 6000 samples are more than 24000 for the first time
    assert len(seen) == random


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batching": "label_awar"}, "batching: unknown 'label_awar'; did you mean 'label_aware'"),
        ({"batching_conf": {"powr": 1}}, "batching_conf: unknown 'powr'; did you mean 'power'"),
        ({"batching_conf": {"power": "1"}}, "power is '1', it must be float"),
        ({"batching_conf": {"order": 0}}, "batching_conf: order is 0"),
        ({"batching_conf": {"stream": "all"}}, "must be one of unlabelled, labelled, both"),
        ({"batching": "random", "batching_labels": "f"}, "go with batching: label_aware"),
        ({"batching": "random", "batching_conf": {"order": 2}}, "go with batching: label_aware"),
        ({"batching_conf": {"stream": "labelled"}, "batching_labels": "f"}, "labelled has text"),
    ],
)
def test_bad_settings_are_refused_before_any_work(changes, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"method": "mpl", "batching": "label_aware", **changes}))
    with pytest.raises(ConfigError, match=message):
        load_config([path])


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("supervised", {}, "method supervised has no unlabelled batches"),
        ("slimipl", {}, "label-aware ones do not come again; method_conf: capacity: 0"),
        ("mpl", {"batch_type": "folded", "fold_length": [9]}, "'numel' .* not 'folded'"),
        ("mpl", {}, "mpl has no stored records; give batching_labels"),
        ("mpl", {"batch_bins": 7000}, "labelled speech: no label is in two .*8 were left out"),
    ],
)
def test_what_cannot_be_batched_is_refused_before_training(method, changes, message, arguments):
    conf = {"stream": "labelled"} if "batch_bins" in changes else {}
    argv = arguments(method, batching="label_aware", batching_conf=conf, **changes)
    with pytest.raises(ConfigError, match=message):
        main(argv)


@pytest.mark.parametrize(
    "text, others, match",
    [
        ("a A\nb B\nx C\nc A", False, r"labels:3: utterance 'x' is none of the speech"),
        ("a A\nb B\nb B\nc A", False, r"labels:3: utterance 'b' is there twice"),
        ("a A\nb B\nb B\nc A", True, r"labels:3: utterance 'b' is there twice"),
        ("b B", False, r"labels has no line of 2 utterances: a, c"),
        ("", False, r"labels has no line of 3 utterances: a, b, c"),
        (None, False, r"labels: No such file"),
    ],
)
def test_a_file_of_other_speech_is_refused_by_name(text, others, match, tmp_path):
    path = tmp_path / "labels"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        list(of_text(path, {"a": 1, "b": 1, "c": 1}, str.split, others))


def test_a_file_may_have_empty_lines_and_utterances_that_say_nothing(tmp_path):
    (tmp_path / "labels").write_text("b B  C\n\na\nx C\n")
    found = of_text(tmp_path / "labels", {"a": 1, "b": 1}, str.split, others=True)
    assert list(found) == [("b", ["B", "C"]), ("a", [])]


def test_batches_by_number_take_as_many_utterances(arguments, corpus, seen):
    changes = {"batch_type": "unsorted", "batch_size": 6, "num_iters_per_epoch": 4}
    argv = arguments("mpl", method_conf={"labelled": 0}, max_epoch=1, **changes, **{
        "batching": "label_aware"
    })  # fmt: skip
    main([*argv, "--batching_labels", str(corpus / "data/unlabelled/truth")])
    assert [len(ids) for _, ids in seen] == [6] * 4
    assert torch.tensor([len(set(ids)) for _, ids in seen]).eq(6).all()
