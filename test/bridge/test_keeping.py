"""bridge/keeping: a training that is told to stop goes on from the next update, bit by bit."""

import os
import re
import signal

import pytest
import torch

from espnet_pl.bridge.keeping import Interval
from espnet_pl.bridge.model import PLModel
from espnet_pl.bridge.train import ConfigError, load_config, main
from espnet_pl.methods.registry import methods
from test.bridge.conftest import ASR, TRANSDUCER
from test.bridge.test_train import SMALL, conf_of, same, teacher_of


def loaded(path):
    return torch.load(path, weights_only=True)


def lines(text):
    """What the log says of updates and epochs, without times and what is said of them."""
    found = re.findall(r"\d+epoch(?::train:| results:).*", text)
    timed = r"(iter_time|\w+_time|time|train_time)=[^,\]]*(, \d+[^,=\]]*)?|, total_count=\d+"
    return [re.sub(timed, "", line) for line in found]


@pytest.fixture
def signals(monkeypatch):
    """Send this process a signal in some forward passes, counted over all runs of a test."""
    stock, passes, when = PLModel.forward, [0], {}

    def forward(self, **flat):
        passes[0] += 1
        if sign := when.get(passes[0]):
            os.kill(os.getpid(), sign)
        return stock(self, **flat)

    monkeypatch.setattr(PLModel, "forward", forward)
    return passes, when


@pytest.fixture
def until_done(signals):
    """Run a training, again and again, stopped in these forward passes; how often it was."""

    def call(argv, **stops):
        passes, when = signals
        passes[0] = 0
        when.clear()
        when.update({int(name[1:]): sign for name, sign in stops.items()})
        for times in range(10):
            try:
                main([*argv, "--resume", "true"])
                return times
            except SystemExit as end:
                assert end.code == 75

    return call


# 5 updates and 1 batch of validation an epoch: in the middle, last of an epoch, in a validation.
STOPS = {"_3": signal.SIGTERM, "_5": signal.SIGUSR1, "_12": signal.SIGUSR2}


@pytest.mark.parametrize("method", methods())
def test_a_stopped_training_goes_on_bit_by_bit(method, until_done, arguments, tmp_path, caplog):
    caplog.set_level("INFO")
    conf, more = conf_of(method), teacher_of(method, tmp_path)
    main([*arguments(method, "whole", conf, max_epoch=3, log_interval=2), *more])
    expected = lines(caplog.text)
    caplog.clear()
    argv = [*arguments(method, "parts", conf, max_epoch=3, log_interval=2), *more]
    assert until_done(argv, **STOPS) == 3
    assert lines(caplog.text) == expected and len(expected) == 9
    whole, parts = (loaded(tmp_path / d / "checkpoint.pth") for d in ("whole", "parts"))
    for name in ("model", "optimizers", "schedulers", "epoch", "step", "gradients"):
        assert same(whole[name], parts[name]), name
    assert (whole["epoch"], whole["step"]) == (4, 0)
    for file in ("2epoch.pth", "valid.loss.ave.pth"):
        assert same(loaded(tmp_path / "whole" / file), loaded(tmp_path / "parts" / file))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_workers": 2, "noise_apply_prob": 0.7, "noise_db_range": "5_15"},  # workers draw
        {"accum_grad": 2},  # the last gradient of an epoch is left for the next
        {"scheduler": "warmuplr", "scheduler_conf": {"warmup_steps": 7}},
        {"batching": "label_aware", "batching_conf": {"stream": "labelled"}},
        {"num_workers": 1, "method_conf": SMALL | {"replace": 1.0, "replace_when": "settled"}},
    ],
    ids=["workers", "accumulated", "schedule", "label-aware", "evolving"],
)
def test_all_that_decides_an_update_is_kept(changes, until_done, arguments, corpus, tmp_path):
    changes = {"max_epoch": 2, "save_interval": 2, "method_conf": SMALL, **changes}
    if "noise_apply_prob" in changes:
        changes["noise_scp"] = str(corpus / "data/dev/wav.scp")
    main(arguments("slimipl", "whole", **changes))
    argv = arguments("slimipl", "parts", **changes)
    assert until_done(argv, _5=signal.SIGTERM, _8=signal.SIGTERM) == 2
    whole, parts = (loaded(tmp_path / d / "checkpoint.pth") for d in ("whole", "parts"))
    for name in ("model", "optimizers", "schedulers", "gradients"):
        assert same(whole[name], parts[name]), name
    assert bool(whole["gradients"]) == ("accum_grad" in changes)


def test_a_validation_that_draws_numbers_is_begun_anew(until_done, arguments, caplog):
    """ESPnet's transducer has the dropout of its auxiliary CTC layer in validations, too."""
    caplog.set_level("INFO")
    drops = {"auxiliary_ctc_weight": 0.3, "auxiliary_ctc_dropout_rate": 0.5}
    changes = {"base": TRANSDUCER | {"model_conf": drops}, "method_conf": SMALL}
    main(arguments("slimipl", "whole", **changes))
    expected = lines(caplog.text)
    caplog.clear()
    assert until_done(arguments("slimipl", "parts", **changes), _6=signal.SIGTERM) == 1
    assert lines(caplog.text) == expected


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed, again", [(4, 3), (5, 5), (6, 6), (7, 6)])
def test_no_more_than_the_interval_is_lost(killed, again, arguments, tmp_path, monkeypatch):
    """Killed in this update, and the first that is made again: epochs of 5, saved every 2."""
    stock, made = PLModel.forward, []

    def forward(self, **flat):
        if self.training:
            made.append(int(self.method.step) + 1)
            if len(made) == killed:
                raise Killed
        return stock(self, **flat)

    monkeypatch.setattr(PLModel, "forward", forward)
    argv = [*arguments("mpl", max_epoch=2, save_interval=2), "--resume", "true"]
    with pytest.raises(Killed):
        main(argv)
    assert made == list(range(1, killed + 1))
    made[:] = [None] * killed
    main(argv)
    assert made[killed:] == list(range(again, 11))


def test_a_signal_leaves_other_handlers_as_they_were(until_done, arguments):
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGUSR1)}
    until_done(arguments("supervised", max_epoch=1), _2=signal.SIGTERM)
    assert before == {sign: signal.getsignal(sign) for sign in before}


def test_a_checkpoint_of_another_training_is_refused_by_name(arguments, tmp_path):
    main(arguments("mpl", max_epoch=1))
    argv = arguments("mpl", method_conf={"delta": 0.5}, max_epoch=2)
    with pytest.raises(ConfigError, match="another training:\n    method_conf: {} -> {'delta'"):
        main([*argv, "--resume", "true"])


def test_a_damaged_checkpoint_makes_way_for_the_one_before(arguments, tmp_path, caplog):
    main(arguments("mpl", "whole", max_epoch=2))
    main(arguments("mpl", "exp", max_epoch=2))
    path = tmp_path / "exp/checkpoint.pth"
    path.write_bytes(path.read_bytes()[:-100])
    main([*arguments("mpl", "exp", max_epoch=2), "--resume", "true"])
    assert "goes on from" in caplog.text
    assert same(loaded(path)["model"], loaded(tmp_path / "whole/checkpoint.pth")["model"])
    for file in (path, path.with_name("checkpoint.previous.pth")):
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match="no checkpoint is whole"):
        main([*arguments("mpl", "exp", max_epoch=2), "--resume", "true"])


def test_a_new_run_in_an_old_folder_never_falls_back_to_the_old_one(arguments, tmp_path):
    main(arguments("mpl", max_epoch=1))
    main(arguments("supervised", max_epoch=1))
    found = {p.name: loaded(p)["traits"]["method"] for p in tmp_path.glob("exp/checkpoint*.pth")}
    assert found.pop("checkpoint.old.pth") == "'mpl'"
    assert found == {"checkpoint.pth": "'supervised'"}


@pytest.mark.parametrize("words", ["0", "10 min", "-1", "1h", "often"])
def test_an_interval_that_is_none(words, tmp_path):
    (tmp_path / "asr.yaml").write_text(f"save_interval: {words}\n")
    with pytest.raises(ConfigError, match="save_interval is .*give a number of updates"):
        load_config([tmp_path / "asr.yaml"])


def test_intervals_are_of_updates_or_of_time(monkeypatch):
    assert ASR["log_interval"]  # as ESPnet's own intervals
    updates = Interval("3")
    assert [updates.over(n) for n in (2, 3)] == [False, True]
    updates.begin(3)
    assert not updates.over(5)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    minutes = Interval("2min")
    now[0] += 119
    assert not minutes.over(10**6)
    now[0] += 1
    assert minutes.over(0)
