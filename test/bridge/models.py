"""Model folders of every family, with random weights that say something; no training."""

import math

import torch
from espnet2.tasks.lm import LMTask
from espnet2.utils.yaml_no_alias_safe_dump import yaml_no_alias_safe_dump

from espnet_pl.bridge.teachers import FAMILIES
from test.bridge.conftest import ASR, DECODER, TRANSDUCER

WORDS = ["<blank>", "<unk>", "A", "B", "C", "<sos/eos>"]
CONFS = {
    "ctc": ASR,
    "attention": ASR | DECODER | {"model_conf": {"ctc_weight": 0.3}},
    "transducer": TRANSDUCER,
}


def model_folder(folder, kind="ctc", token_list=WORDS, token_type="word", seed=0, **changes):
    """``config.yaml`` and ``model.pth``, as a stock training or our export writes them."""
    conf = CONFS[kind] | changes
    stock, _ = FAMILIES[conf.get("task", "asr")]
    args = stock.get_parser().parse_args([])
    for name, value in conf.items():
        if name != "task":
            setattr(args, name, value)
    args.token_list, args.token_type = list(token_list), token_type
    args.model_conf = {**args.model_conf}
    torch.manual_seed(seed)
    net = stock.build_model(args)
    with torch.no_grad():  # random layers hardly say anything
        for name, parameter in net.named_parameters():
            if any(part in name for part in ("ctc_lo.weight", "ctc_lin.weight", "lin_out.weight")):
                parameter *= 30
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml_no_alias_safe_dump(vars(args), indent=4, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    torch.save(net.state_dict(), folder / "model.pth")
    return folder


def lm_folder(folder, token_list=WORDS, weights="model.pth", seed=0, **changes):
    """A language model as ``espnet2.bin.lm_train`` writes it, with random weights and opinions."""
    args = LMTask.get_parser().parse_args([])
    conf = {"lm": "seq_rnn", "lm_conf": {"unit": 8, "nlayers": 1}} | changes
    for name, value in conf.items():
        setattr(args, name, value)
    args.token_list, args.token_type, args.model_conf = list(token_list), "word", {}
    torch.manual_seed(seed)
    net = LMTask.build_model(args)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 4
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml_no_alias_safe_dump(vars(args), indent=4, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    torch.save(net.state_dict(), folder / weights)
    return folder


def arpa_file(path, words=("A", "B", "C"), shares=(0.6, 0.2, 0.1)):
    """1-grams with these shares; a sentence ends with what they leave."""
    entries = [*zip(words, shares), ("</s>", 1 - sum(shares))]
    lines = [f"{math.log10(p)}\t{word}" for word, p in entries]
    header = ["\\data\\", f"ngram 1={len(lines) + 1}", "\\1-grams:", "-99\t<s>"]
    path.write_text("\n".join([*header, *lines, "\\end\\", ""]))
    return path
