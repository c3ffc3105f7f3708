"""bridge/lm_train: ESPnet's language models, and what is left of a training that was killed."""

import pytest
import torch

from espnet_pl.bridge import checkpoints
from espnet_pl.bridge.language_models import load
from espnet_pl.bridge.lm_train import main
from test.bridge.models import WORDS

CONF = """
lm: seq_rnn
lm_conf: {unit: 8, nlayers: 1}
optim: adam
keep_nbest_models: 1
num_workers: 0
"""


@pytest.fixture
def train(tmp_path):
    (tmp_path / "lm.yaml").write_text(CONF)
    (tmp_path / "text").write_text("".join(f"u{i} A B\n" for i in range(8)))
    (tmp_path / "tokens.txt").write_text("".join(f"{token}\n" for token in WORDS))

    def call(epochs):
        argv = ["--config", str(tmp_path / "lm.yaml"), "--max_epoch", str(epochs)]
        argv += ["--token_type", "word", "--token_list", str(tmp_path / "tokens.txt")]
        for part in ("train", "valid"):
            argv += [f"--{part}_data_path_and_name_and_type", f"{tmp_path}/text,text,text"]
            argv += [f"--{part}_shape_file", str(tmp_path / "text")]
        argv += ["--batch_type", "unsorted", "--batch_size", "4", "--resume", "true"]
        argv += ["--best_model_criterion", "valid,loss,min", "--use_tensorboard", "false"]
        main([*argv, "--use_matplotlib", "false", "--output_dir", str(tmp_path / "lm")])
        return tmp_path / "lm"

    return call


def test_it_is_a_stock_language_model(train):
    model = load(train(2), list(WORDS))
    assert torch.isfinite(model.log_p([[2, 3], [4]])).all()


def test_killed_while_it_saves_it_goes_on_from_the_epoch_before(train, monkeypatch):
    folder = train(1)
    whole, save = (folder / "checkpoint.pth").read_bytes(), checkpoints._save

    def half(states, file, *args, **kwargs):
        save(states, file, *args, **kwargs)
        with open(file, "r+b") as cut:
            cut.truncate(100)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_save", half)
        with pytest.raises(KeyboardInterrupt):
            train(3)
    assert (folder / "checkpoint.pth").read_bytes() == whole
    left = folder / ".checkpoint.pth.host-1"  # as SIGKILL leaves it
    left.write_bytes(b"half")
    train(3)
    assert not left.exists()
    reporter = torch.load(folder / "checkpoint.pth", weights_only=False)["reporter"]
    assert reporter["epoch"] == 3
