"""A recipe in miniature: noise for speech, letters for tokens, the real ESPnet around it."""

import json
import shlex

import numpy as np
import pytest
import soundfile
import yaml

ASR = {
    "frontend": "default",
    "frontend_conf": {"fs": "8k", "n_fft": 128, "hop_length": 80, "n_mels": 16},
    "specaug": "specaug",
    "specaug_conf": {
        "apply_time_warp": False,
        "apply_freq_mask": True,
        "freq_mask_width_range": [0, 4],
        "num_freq_mask": 1,
        "apply_time_mask": True,
        "time_mask_width_range": [0, 5],
        "num_time_mask": 1,
    },
    "normalize": "utterance_mvn",
    "encoder": "conformer",
    "encoder_conf": {
        "output_size": 8,
        "attention_heads": 2,
        "linear_units": 8,
        "num_blocks": 1,
        "macaron_style": True,
        "rel_pos_type": "latest",
        "pos_enc_layer_type": "rel_pos",
        "selfattention_layer_type": "rel_selfattn",
        "cnn_module_kernel": 3,
    },
    "model_conf": {"ctc_weight": 1.0},
    "optim": "adam",
    "optim_conf": {"lr": 0.01},
    "batch_type": "numel",
    "batch_bins": 24000,
    "best_model_criterion": [["valid", "loss", "min"]],
    "keep_nbest_models": 2,
    "num_workers": 0,
    "max_epoch": 2,
    "num_iters_per_epoch": 5,
    "log_interval": 1,
}
TRANSDUCER = {name: ASR[name] for name in ASR if not name.startswith("encoder")} | {
    "task": "asr_transducer",
    "encoder_conf": {
        "main_conf": {"pos_wise_act_type": "swish", "conv_mod_act_type": "swish"},
        "input_conf": {"vgg_like": False, "subsampling_factor": 4, "conv_size": 8},
        "body_conf": [
            {
                "block_type": "conformer",
                "linear_size": 8,
                "hidden_size": 8,
                "heads": 2,
                "conv_mod_kernel_size": 3,
            }
        ],
    },
    "decoder": "stateless",
    "decoder_conf": {"embed_size": 8},
    "joint_network_conf": {"joint_space_size": 8},
    "model_conf": {"auxiliary_ctc_weight": 0.3},
}
DECODER = {
    "decoder": "transformer",
    "decoder_conf": {"attention_heads": 2, "linear_units": 8, "num_blocks": 1},
}


def make_corpus(root, unlabelled, sound):
    """data/{labelled,unlabelled,dev} under a folder, and a token list.

    Args:
        unlabelled: how many utterances.
        sound: samples of one, from a generator of random numbers.
    """
    rng = np.random.default_rng(0)
    for name, size in (("labelled", 8), ("unlabelled", unlabelled), ("dev", 3)):
        folder = root / "data" / name
        folder.mkdir(parents=True)
        lines = {"wav.scp": [], "text": [], "speech_shape": []}
        for i in range(size):
            utt_id, samples = f"{name}{i:02d}", sound(rng)
            wav = folder / f"{utt_id}.wav"
            soundfile.write(wav, samples, 8000)
            lines["wav.scp"].append(f"{utt_id} {wav}")
            lines["text"].append(f"{utt_id} {' '.join(rng.choice(list('ABC'), 3))}")
            lines["speech_shape"].append(f"{utt_id} {len(samples)}")
        for file, content in lines.items():
            if (name, file) == ("unlabelled", "text"):
                file = "truth"
            (folder / file).write_text("\n".join(content) + "\n")
    (root / "tokens.txt").write_text("<blank>\n<unk>\nA\nB\nC\n<sos/eos>\n")
    return root


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Noise of half a second and more."""
    root = tmp_path_factory.mktemp("corpus")
    return make_corpus(root, 10, lambda rng: 0.1 * rng.standard_normal(rng.integers(4000, 6000)))


@pytest.fixture
def arguments(corpus, tmp_path):
    """The argv of ``espnet_pl.bridge.train`` for a method, with changes to the configuration."""

    def make(method="slimipl", out="exp", method_conf=None, base=ASR, **changes):
        asr, own = tmp_path / f"{out}_asr.yaml", tmp_path / f"{out}_method.yaml"
        asr.write_text(yaml.safe_dump(base))
        own.write_text(
            yaml.safe_dump({"method": method, "method_conf": method_conf or {}, **changes})
        )
        argv = ["--config", str(asr), "--config", str(own), "--output_dir", str(tmp_path / out)]
        argv += ["--token_list", str(corpus / "tokens.txt"), "--token_type", "word", "--ngpu", "0"]
        for flag, name in (("train", "labelled"), ("valid", "dev"), ("unlabelled", "unlabelled")):
            data = corpus / "data" / name
            argv += [f"--{flag}_data_path_and_name_and_type", f"{data}/wav.scp,speech,sound"]
            argv += [f"--{flag}_shape_file", f"{data}/speech_shape"]
            if flag != "unlabelled":
                argv += [f"--{flag}_data_path_and_name_and_type", f"{data}/text,text,text"]
        return [*argv, "--truth", str(corpus / "data/unlabelled/truth")]

    return make


@pytest.fixture
def exp(arguments, tmp_path):
    """A folder that says how its training is done: slimipl's, a small one."""
    folder = tmp_path / "exp"
    folder.mkdir()
    settings = {"capacity": 2, "unlabelled": 2, "replace": 0.5}
    command = ["python3", "-m", "espnet_pl.bridge.train", *arguments("slimipl", "exp", settings)]
    (folder / "train.job.json").write_text(json.dumps({"shell": shlex.join(command)}))
    return folder
