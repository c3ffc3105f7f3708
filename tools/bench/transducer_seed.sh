#!/usr/bin/env bash
# Trains the transducer whose posteriors tools/bench/fullsum.py uses: tools/bench/transducer_seed.sh [DIR]
# On the generated speech of egs/mini_alnum, about a quarter of an hour on one core. Its vocabulary is
# filled up to the 1000 tokens of the benchmark; what is not a character never occurs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
exp=$(realpath -m "${1:-$root/egs/mini_alnum/pl1/exp_bench/transducer_seed}")
cd "$root"
. egs/mini_alnum/pl1/path.sh
cd egs/mini_alnum/pl1
./run.sh --stop_stage create_dataset

mkdir -p "$exp"
python3 - data/train_labelled/text >"$exp/tokens.txt" <<'PYTHON'
import sys

lines = open(sys.argv[1], encoding="utf-8").read().splitlines()
characters = {c for line in lines for c in line.partition(" ")[2].replace(" ", "")}
tokens = ["<blank>", "<unk>", "<space>", *sorted(characters)]
print("\n".join(tokens + [f"<unused{k}>" for k in range(999 - len(tokens))] + ["<sos/eos>"]))
PYTHON
data() { # data FLAG SET
    echo "--$1_data_path_and_name_and_type data/$2/wav.scp,speech,sound" \
        "--$1_data_path_and_name_and_type data/$2/text,text,text --$1_shape_file data/$2/speech_shape"
}
# shellcheck disable=SC2046  # words
python3 -m espnet_pl.bridge.train --config conf/asr_transducer.yaml \
    --config "$root/tools/bench/transducer_seed.yaml" --output_dir "$exp" --resume true --seed 1 \
    --token_type char --token_list "$exp/tokens.txt" --ngpu 0 \
    $(data train train_labelled) $(data valid dev)
python3 -m espnet_pl.bridge.export --exp "$exp" --output "$exp/model"
