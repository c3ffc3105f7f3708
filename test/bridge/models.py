"""Model folders of every family, with random weights that say something; no training."""

import torch
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
