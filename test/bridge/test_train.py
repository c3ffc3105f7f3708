"""bridge: real ESPnet training, exact restarts, stock checkpoints, refused configurations."""

import re

import pytest
import torch
import yaml
from espnet2.tasks.asr import ASRTask

from espnet_pl.bridge.export import export
from espnet_pl.bridge.train import ConfigError, load_config, main, needs_unlabelled
from espnet_pl.methods.registry import config_of, methods, module_of
from espnet_pl.parts.cache import PseudoLabelCache
from test.bridge.conftest import DECODER
from test.bridge.models import arpa_file, model_folder

SMALL = {"capacity": 2, "unlabelled": 2, "replace": 0.5}


def weights(path):
    return torch.load(path, weights_only=False)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def conf_of(method):
    views = {"weak_speeds": [1.0, 0.9], "strong_speeds": [0.9, 1.0, 1.1]}
    return {"slimipl": SMALL | views, "mpl": views}.get(method, {})


def teacher_of(method, tmp_path):
    """What a method cannot do without, on the command line."""
    if "language_model" in module_of(method).Method.needs(config_of(method, {})):
        return ["--language_model", str(arpa_file(tmp_path / "lm.arpa"))]
    if not module_of(method).Method.taught:
        return []
    folder = model_folder(tmp_path / "teacher", "attention")
    return ["--teachers", str(folder), "--teacher_mode", "online"]


@pytest.mark.parametrize("method", methods())
def test_a_restart_continues_bit_by_bit(method, arguments, tmp_path):
    conf, more = conf_of(method), teacher_of(method, tmp_path)
    main([*arguments(method, "whole", conf, max_epoch=3), *more])
    main([*arguments(method, "parts", conf, max_epoch=1), *more])
    main([*arguments(method, "parts", conf, max_epoch=3), *more, "--resume", "true"])
    whole, parts = (weights(tmp_path / d / "checkpoint.pth") for d in ("whole", "parts"))
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])
    assert whole["optimizers"][0]["method"]["step"] == 15


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_depends_on_its_labels_continues_bit_by_bit(workers, arguments, tmp_path):
    conf = SMALL | {"capacity": 3, "replace": 1.0, "replace_when": "settled", "label": "sampled"}
    changes = dict(method_conf=conf, num_workers=workers)
    main(arguments("slimipl", "whole", max_epoch=4, **changes))
    main(arguments("slimipl", "parts", max_epoch=2, **changes))
    main([*arguments("slimipl", "parts", max_epoch=4, **changes), "--resume", "true"])
    whole, parts = (weights(tmp_path / d / "checkpoint.pth") for d in ("whole", "parts"))
    assert same(whole["model"], parts["model"])
    assert same(whole["optimizers"], parts["optimizers"])
    method = whole["optimizers"][0]["method"]
    changes = method["evolution._extra_state"]
    assert len(changes) > 10 and changes.unique().numel() > 2
    assert method["cache._extra_state"]["made_at"].unique().numel() > 1  # some have left


def test_every_checkpoint_is_a_stock_one(arguments, tmp_path):
    main(arguments("slimipl", method_conf=SMALL | {"teacher": "ema"}))
    net, _ = ASRTask.build_model_from_file(
        tmp_path / "exp/config.yaml", tmp_path / "exp/2epoch.pth", "cpu"
    )
    saved = weights(tmp_path / "exp/2epoch.pth")
    assert net.state_dict().keys() == saved.keys()
    assert all(torch.equal(saved[k], v) for k, v in net.state_dict().items())
    method = weights(tmp_path / "exp/checkpoint.pth")["optimizers"][0]["method"]
    assert any(k.startswith("teacher.") for k in method)


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_an_exported_model_gives_the_log_probabilities_of_training(source, arguments, tmp_path):
    main(arguments("mpl", method_conf={"horizon": 2}, keep_nbest_models=1))
    exp = tmp_path / "exp"
    export(exp, exp / "model", source)
    config = yaml.safe_load((exp / "model/config.yaml").read_text())
    assert not [k for k in config if k.startswith(("method", "unlabelled", "truth"))]
    exported, _ = ASRTask.build_model_from_file(
        exp / "model/config.yaml", exp / "model/model.pth", "cpu"
    )
    state = weights(exp / "checkpoint.pth")["optimizers"][0]["method"]
    prefix = "teacher._average.module.net."
    if source == "teacher":
        expected = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    else:
        expected = weights(exp / "valid.loss.ave.pth")
    reference, _ = ASRTask.build_model_from_file(exp / "config.yaml", exp / "2epoch.pth", "cpu")
    reference.load_state_dict(expected)
    speech, lengths = torch.randn(2, 5000), torch.tensor([5000, 4000])
    outputs = [m.eval().encode(speech, lengths)[0] for m in (exported, reference)]
    assert torch.equal(*(m.ctc.log_softmax(o) for m, o in zip((exported, reference), outputs)))


def test_export_of_an_unfinished_run_says_so(arguments, tmp_path):
    main([*arguments(), "--dry_run", "true"])
    with pytest.raises(FileNotFoundError, match="has not finished"):
        export(tmp_path / "exp", tmp_path / "exp/model")
    assert not (tmp_path / "exp/model").exists()


def test_a_teacher_is_exported_only_where_there_is_one(arguments, tmp_path):
    main(arguments("supervised", max_epoch=1))
    with pytest.raises(ValueError, match="no teacher"):
        export(tmp_path / "exp", tmp_path / "exp/model", "teacher")


@pytest.mark.parametrize("method", methods())
def test_attention_models_train_too(method, arguments, tmp_path):
    changes = dict(method_conf=conf_of(method), max_epoch=1, model_conf={"ctc_weight": 0.3})
    main([*arguments(method, **DECODER, **changes), *teacher_of(method, tmp_path)])
    names = weights(tmp_path / "exp/1epoch.pth")
    assert any(k.startswith("decoder.") for k in names)
    assert all(v.isfinite().all() for v in names.values() if v.is_floating_point())


def test_diagnostics_are_in_the_log(arguments, tmp_path, caplog):
    caplog.set_level("INFO")
    main(arguments(method_conf=SMALL))
    text = caplog.text
    for name in (
        "pseudo",
        "supervised",
        "blank_share",
        "frame_entropy",
        "token_entropy",
        "labels_empty",
        "label_age",
        "label_churn",
        "label_error_rate",
    ):
        assert re.search(rf"\b{name}=", text), name


def test_a_seed_is_what_the_teacher_starts_from(arguments, tmp_path):
    main(arguments("supervised", "seed", max_epoch=1))
    seed = tmp_path / "seed/1epoch.pth"
    frozen = {"teacher": "frozen", "capacity": 0, "unlabelled": 1}
    main([*arguments("slimipl", "pl", frozen, max_epoch=1), "--init_param", str(seed)])
    state = weights(tmp_path / "pl/checkpoint.pth")["optimizers"][0]["method"]
    for name, value in weights(seed).items():
        assert torch.equal(state[f"teacher._average.module.net.{name}"], value), name


def test_other_teachers_label_too(arguments, tmp_path):
    main(arguments("supervised", "seed", max_epoch=1))
    export(tmp_path / "seed", tmp_path / "seed/model")
    path = tmp_path / "seed/model/model.pth"
    talkative = weights(path)
    talkative["ctc.ctc_lo.bias"][3] += 100  # says B, and nothing else
    torch.save(talkative, path)
    argv = arguments("mpl", method_conf={"labelled": 0}, max_epoch=1)
    main([*argv, *["--teachers", str(path.parent)] * 2])  # two are a majority
    cache = PseudoLabelCache()
    state = weights(tmp_path / "exp/checkpoint.pth")["optimizers"][0]["method"]
    cache.set_extra_state(state["cache._extra_state"])
    assert len(cache) == 10 and all(cache.get(f"unlabelled{i:02d}") == [3] for i in range(10))
    export(tmp_path / "exp", tmp_path / "exp/model")
    assert "teachers" not in yaml.safe_load((tmp_path / "exp/model/config.yaml").read_text())


def test_other_teachers_that_do_not_fit(arguments, tmp_path):
    main(arguments("supervised", "seed", max_epoch=1))
    model = tmp_path / "seed/model"
    with pytest.raises(ConfigError, match="model/config.yaml is missing"):
        main([*arguments("mpl"), "--teachers", str(model)])
    export(tmp_path / "seed", model)
    with pytest.raises(ConfigError, match="supervised makes no pseudo-labels"):
        main([*arguments("supervised"), "--teachers", str(model)])
    other = tmp_path / "other.txt"
    other.write_text("<blank>\n<unk>\nA\nC\nB\n<sos/eos>\n")
    with pytest.raises(ConfigError, match="seed/model has other tokens"):
        main([*arguments("mpl"), "--teachers", str(model), "--token_list", str(other)])


def test_parts_of_a_seed_can_be_loaded_as_in_stock_espnet(arguments, tmp_path):
    main(arguments("supervised", "seed", max_epoch=1))
    seed = tmp_path / "seed/1epoch.pth"
    conf, start = dict(max_epoch=1, optim_conf={"lr": 0.0}), [f"{seed}:encoder:encoder"]
    main([*arguments("supervised", "flag", **conf), "--init_param", *start])
    main(arguments("supervised", "file", **conf, init_param=start))
    old, moving = weights(seed), ("running", "batches")
    mine = [k for k in old if k.startswith("encoder.") and not any(m in k for m in moving)]
    for way in ("flag", "file"):
        new = weights(tmp_path / way / "1epoch.pth")
        assert mine and all(torch.equal(old[k], new[k]) for k in mine)
        assert not torch.equal(old["ctc.ctc_lo.weight"], new["ctc.ctc_lo.weight"])


def test_frozen_parameters_stay(arguments, tmp_path):
    main(arguments("supervised", "a", max_epoch=1))
    init = ["--init_param", str(tmp_path / "a/1epoch.pth")]
    main([*arguments("supervised", "b", max_epoch=1, freeze_param=["ctc"]), *init])
    a, b = weights(tmp_path / "a/1epoch.pth"), weights(tmp_path / "b/1epoch.pth")
    assert torch.equal(a["ctc.ctc_lo.weight"], b["ctc.ctc_lo.weight"])
    assert not torch.equal(a["encoder.embed.conv.0.weight"], b["encoder.embed.conv.0.weight"])
    with pytest.raises(ConfigError, match="no parameter 'ctcx'"):
        main(arguments("supervised", "c", freeze_param=["ctcx"]))


def test_a_checkpoint_of_stock_espnet_is_not_continued_silently(arguments, tmp_path):
    main(arguments("supervised", max_epoch=1))
    path = tmp_path / "exp/checkpoint.pth"
    states = weights(path)
    del states["optimizers"][0]["method"]
    torch.save(states, path)
    with pytest.raises(ConfigError, match="no checkpoint is whole: .* as a checkpoint of ours"):
        main([*arguments("supervised", max_epoch=2), "--resume", "true"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metod": "mpl"}, "unknown 'metod'; did you mean 'method'"),
        ({"method": "slimpl"}, "did you mean 'slimipl'"),
        ({"method": "base"}, "unknown 'base'"),  # a file beside the methods
        ({"method": "slimipl", "method_conf": {"capacty": 3}}, "did you mean 'capacity'"),
        ({"encoder_conf": {"num_block": 2}}, "encoder_conf: unknown 'num_block'"),
        ({"encoder": "confomer"}, "did you mean 'conformer'"),
        (
            {"best_model_criterion": [["valid", "loss", "min"], ["valid", "acc", "max"]]},
            "one of each",
        ),
        ({"train_dtype": "float16"}, "train_dtype: float16: .*use_amp: true"),
    ],
)
def test_bad_configurations_are_refused_before_any_work(changes, message, arguments, tmp_path):
    argv = arguments("supervised", **{k: v for k, v in changes.items() if "method" not in k})
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(changes))
    with pytest.raises(ConfigError, match=message):
        main([*argv, "--config", str(tmp_path / "bad.yaml")])
    assert not (tmp_path / "exp").exists()


def test_a_misspelt_flag_is_refused_and_the_nearest_named(arguments):
    with pytest.raises(ConfigError, match="did you mean '--max_epoch'"):
        main([*arguments(), "--max_epohc", "3"])


def test_later_files_change_what_earlier_ones_said_key_by_key(tmp_path):
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("encoder: conformer\nencoder_conf: {num_blocks: 2, output_size: 8}\n")
    b.write_text("encoder_conf: {num_blocks: 3}\nrecipe: {init: supervised}\n")
    assert load_config([a, b]) == {
        "encoder": "conformer",
        "encoder_conf": {"num_blocks": 3, "output_size": 8},
    }


@pytest.mark.parametrize("text, message", [("- 1\n", "a mapping"), ("a: [\n", "is not YAML")])
def test_files_that_are_no_configuration(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config([tmp_path / "a.yaml"])
    with pytest.raises(ConfigError, match="No such file"):
        load_config([tmp_path / "missing.yaml"])


def test_who_needs_unlabelled_speech():
    assert not needs_unlabelled({"method": "supervised"})
    assert needs_unlabelled({"method": "mpl"})


def test_unlabelled_speech_that_is_missing_is_asked_for(arguments):
    argv = arguments(method_conf=SMALL)
    start = argv.index("--unlabelled_data_path_and_name_and_type")
    with pytest.raises(ConfigError, match="needs unlabelled speech"):
        main(argv[:start] + argv[start + 4 :])
