#!/usr/bin/env bash
# ./run.sh [--method NAME|all] [--stage N|NAME] [--stop_stage N|NAME] [--cmd local|slurm] [--dry_run]
# ./run.sh --help lists every option. The same file in every recipe.
set -euo pipefail
cd "$(dirname "$0")"
. ./path.sh
exec python3 -m espnet_pl.recipe.stages "$@"
