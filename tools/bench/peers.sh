#!/usr/bin/env bash
# Makes the environment of the benchmarks' peers: tools/bench/peers.sh [DIR]  (default: tools/bench/venv)
# torchaudio's compiled losses and decoders need the torch they were built for; with what that brings
# along it takes some gigabytes. Prints the Python to give to --peers.
set -euo pipefail
venv=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)/venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install -q torch==2.11.0 torchaudio==2.11.0 numpy \
    pytorch-metric-learning==2.9.0 flashlight-text==0.0.7
echo "$venv/bin/python"
