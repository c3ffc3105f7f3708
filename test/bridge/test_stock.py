"""A trained model in an environment that has ESPnet and not espnet_pl: the same numbers."""

import subprocess
import sysconfig
import venv

import numpy as np
import pytest
import soundfile
import torch
from espnet2.tasks.asr import ASRTask
from espnet2.tasks.asr_transducer import ASRTransducerTask

from espnet_pl.bridge.export import export
from espnet_pl.bridge.recogniser import Recogniser
from espnet_pl.bridge.train import main
from espnet_pl.bridge.transducer import TransducerRecogniser
from espnet_pl.losses.lattice import full_sum
from espnet_pl.methods.base import Utterances
from test.bridge.conftest import TRANSDUCER

LOAD = """
import sys, numpy as np, soundfile, torch
from espnet2.bin.asr_inference import Speech2Text
model = Speech2Text("exp/model/config.yaml", "exp/model/model.pth", beam_size=1, ctc_weight=1.0)
out = {}
for line in open(sys.argv[1]):
    utt_id, wav = line.split()
    speech = torch.tensor(soundfile.read(wav, dtype="float32")[0])[None]
    with torch.no_grad():
        encoded, _ = model.asr_model.encode(speech, torch.tensor([speech.shape[1]]))
        out[utt_id] = model.asr_model.ctc.log_softmax(encoded).numpy()
np.savez("out.npz", **out)
"""
LOAD_TRANSDUCER = """
import sys, numpy as np, soundfile, torch
from espnet2.bin.asr_transducer_inference import Speech2Text
model = Speech2Text("exp/model/config.yaml", "exp/model/model.pth", beam_size=1).asr_model
out = {}
for line in open(sys.argv[1]):
    utt_id, wav = line.split()
    speech = torch.tensor(soundfile.read(wav, dtype="float32")[0])[None]
    with torch.no_grad():
        encoded, _ = model.encode(speech, torch.tensor([speech.shape[1]]))
        predicted = model.decoder(torch.tensor([[0, 2, 3]]))
        out[utt_id] = model.joint_network(encoded[:, :, None], predicted[:, None]).numpy()
np.savez("out.npz", **out)
"""


def read(path):
    """A Kaldi table."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in path.open()}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """The Python of an environment with this one's packages, but for espnet_pl.

    A folder named in a .pth file is searched for packages, but its own .pth files (an
    editable espnet_pl is one) are not read.
    """
    folder = tmp_path_factory.mktemp("stock")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin/python"
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "espnet.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(*argv, cwd):
        return subprocess.run(
            [python, *argv],
            cwd=cwd,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    missing = run("-c", "import espnet2, espnet_pl", cwd=folder)
    assert "No module named 'espnet_pl'" in missing.stderr, missing.stderr
    return run


def elsewhere(stock, script, exp, wav_scp):
    """What a script writes, by utterance, in an environment that has ESPnet only."""
    export(exp, exp / "model")
    loaded = stock("-c", script, str(wav_scp), cwd=exp.parent)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    return np.load(exp.parent / "out.npz")


def here(task, student, exp, wav_scp):
    """The trained model as a student, and each utterance's id and speech."""
    net, _ = task.build_model_from_file(exp / "config.yaml", exp / "latest.pth", "cpu")
    net.load_state_dict(torch.load(exp / "valid.loss.ave.pth"))
    speech = [
        (utt_id, torch.tensor(soundfile.read(wav, dtype="float32")[0])[None])
        for utt_id, wav in read(wav_scp).items()
    ]
    return student(net.eval()), [
        Utterances([utt_id], x, torch.tensor([x.shape[1]])) for utt_id, x in speech
    ]


def decode(stock, program, exp, wav_scp, *options):
    """What a stock program recognises with the exported model."""
    decoded = stock(
        "-m", f"espnet2.bin.{program}", "--ngpu", "0", "--beam_size", "1", *options,
        "--asr_train_config", "exp/model/config.yaml", "--asr_model_file", "exp/model/model.pth",
        "--data_path_and_name_and_type", f"{wav_scp},speech,sound", "--output_dir", "decoded",
        cwd=exp.parent,
    )  # fmt: skip
    assert decoded.returncode == 0, decoded.stderr[-2000:]
    return read(exp.parent / "decoded/1best_recog/text")


def test_log_probabilities_are_those_of_the_training_process_and_everything_is_decoded(
    stock, arguments, corpus, tmp_path
):
    main(arguments("mpl", max_epoch=2))
    exp, wav_scp = tmp_path / "exp", corpus / "data/dev/wav.scp"
    theirs = elsewhere(stock, LOAD, exp, wav_scp)
    student, dev = here(ASRTask, Recogniser, exp, wav_scp)
    for x in dev:
        with torch.no_grad():
            log_p, frames = student.hear(x).frame_log_probs()
        assert theirs[x.utt_id[0]].shape == (1, int(frames), 6)
        assert np.array_equal(theirs[x.utt_id[0]], log_p.numpy())
    text = decode(stock, "asr_inference", exp, wav_scp, "--ctc_weight", "1.0")
    assert set(text) == {x.utt_id[0] for x in dev}


def test_a_transducer_is_the_same_and_is_decoded(stock, arguments, corpus, tmp_path):
    main(arguments("mpl", base=TRANSDUCER, max_epoch=1))
    exp, wav_scp = tmp_path / "exp", corpus / "data/dev/wav.scp"
    theirs = elsewhere(stock, LOAD_TRANSDUCER, exp, wav_scp)
    student, dev = here(ASRTransducerTask, TransducerRecogniser, exp, wav_scp)
    for x in dev:
        log_p = torch.tensor(theirs[x.utt_id[0]])[0].log_softmax(-1)  # t u1 v
        label = torch.stack([log_p[:, 0, 2], log_p[:, 1, 3]])[None]
        frames, lengths = torch.tensor([log_p.shape[0]]), torch.tensor([2])
        expected = full_sum(log_p[..., 0].t()[None], label, frames, lengths)
        with torch.no_grad():
            torch.testing.assert_close(student.hear(x).score([[2, 3]]).double(), expected)
    text = decode(stock, "asr_transducer_inference", exp, wav_scp)
    assert set(text) == {x.utt_id[0] for x in dev}
