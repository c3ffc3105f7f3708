#!/usr/bin/env bash
# Makes data/<set>/{wav.scp,text,utt2spk,spk2utt} for every set; run from the recipe directory.
# Options are those of the script below, here or in ${local_data_opts}: --generated_minutes 20
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "${here}/../../../.." && pwd)
if [ -d "${root}/espnet_pl" ]; then # a checkout need not be installed
    export PYTHONPATH="${root}${PYTHONPATH:+:${PYTHONPATH}}"
fi
. ./db.sh # where the corpus is
# shellcheck disable=SC2086 # several options in one variable
exec python3 "${here}/prepare_corpus.py" ${local_data_opts:-} "$@"
