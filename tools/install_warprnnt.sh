#!/usr/bin/env bash
# Installs espnet_pl's own warprnnt_pytorch, which some of ESPnet's models import (tools/warprnnt_pytorch).
#
#   tools/install_warprnnt.sh [--remove]
#
#   --remove  take it out again
#   --help    this text
#
# It goes to the active environment if espnet_pl is installed there, else to tools/venv. Nothing is
# downloaded or compiled. A warprnnt_pytorch that is not ours is never replaced or removed.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

die() {  # die PROBLEM REMEDY...
    printf '\ninstall_warprnnt.sh: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  -> %s\n' "$@" >&2
    exit 1
}

remove=no
case "$*" in
    "") ;;
    --remove) remove=yes ;;
    --help | -h)
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
        ;;
    *) die "unknown option $*" "there are --remove and --help" ;;
esac

# As in install.sh; what Python would import by it is looked at before.
path=${PYTHONPATH:-}
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_NO_DEPS
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off

where() {  # where MODULE: the file that $python would read to import it; nothing if there is none
    "$python" - "$1" <<'PYTHON'
import importlib.util
import sys

sys.path = [path for path in sys.path if path]  # a working folder is no installation
spec = importlib.util.find_spec(sys.argv[1])
print(spec.origin or "" if spec else "")
PYTHON
}

python=""
for environment in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$root/tools/venv"; do
    python=$environment/bin/python
    if [ -n "$environment" ] && [ -x "$python" ] && [ -n "$(where espnet_pl)" ]; then break; fi
    python=""
done
[ -n "$python" ] || die "espnet_pl is in no active environment, and there is no tools/venv" \
    "tools/install.sh makes one; in an environment with ESPnet: pip install -e $root"

found=$(PYTHONPATH=$path where warprnnt_pytorch)
if [ -n "$found" ] && ! grep -q '+espnet_pl' "$found"; then
    die "another warprnnt_pytorch is there already, and is left alone: $found" \
        "ESPnet imports that one; if it does not work, remove it: $python -m pip uninstall warprnnt_pytorch"
fi

pip() {  # pip WORD...: silent, unless it fails
    local output
    output=$("$python" -m pip "$@" 2>&1) ||
        die "pip $1 failed" "$(tail -n 15 <<<"$output" | cut -c1-300)"
}

if [ $remove = yes ]; then
    if [ -n "$found" ]; then
        pip uninstall -y warprnnt_pytorch
        found=$(PYTHONPATH=$path where warprnnt_pytorch)
        [ -z "$found" ] || die "pip has not removed $found" "was it put there, or into PYTHONPATH, by hand?"
    fi
    echo "there is no warprnnt_pytorch in $environment"
    exit
fi

[ -n "$found" ] ||
    pip install --no-deps --no-build-isolation --use-pep517 -e "$root/tools/warprnnt_pytorch"
version=$(cd / && "$python" -c 'import warprnnt_pytorch as w; w.RNNTLoss(); print(w.__version__)') ||
    die "warprnnt_pytorch is in $environment, but does not work" \
        "is the espnet_pl there as new as this one? Its file: $(where espnet_pl)"
echo "warprnnt_pytorch $version is in $environment"
