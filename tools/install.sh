#!/usr/bin/env bash
# Makes the Python environment that the recipes run in.
#
#   tools/install.sh [--venv DIR] [--python PYTHON] [--cuda | --no-cuda] [--test]
#
#   --venv DIR       where to make it (default: tools/venv; elsewhere, tools/venv becomes a link to it)
#   --python PYTHON  which Python to make it from (default: 3.11, else 3.10, 3.12, 3.13, whichever is found)
#   --cuda           the torch and torchaudio pair that share one CUDA version (default where a GPU is visible)
#   --no-cuda        the default torch, even where a GPU is visible
#   --test           also what tools/test.sh needs
#   --check          install nothing; succeed if the environment is there and up to date
#   --help           this text
#
# Python 3.10 and 3.11 get ESPnet 202511, Python 3.12 and 3.13 get ESPnet 202611; every version is pinned
# in tools/requirements. If an environment with ESPnet is already active, nothing in it is changed: only
# what is missing is added. A second run takes about a second, and an interrupted one continues.
# pip's own settings (index, proxy, cache) are honoured. On Linux the default index has torch with CUDA
# (about 6 GB on disk); with pip set to PyTorch's own CPU index the environment takes about 2 GB,
# or 3 GB with --test: Triton alone is 700 MB.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
requirements=$root/tools/requirements
options="--venv --python --cuda --no-cuda --test --check --help"
log=$root/tools/install.log
venv="" python="" cuda="" test=no check=no
began=$SECONDS

# --- messages -------------------------------------------------------------------------------------

die() {  # die PROBLEM REMEDY...
    printf '\ninstall.sh: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  -> %s\n' "$@" >&2
    exit 1
}

say() { printf '%4d s  %s\n' $((SECONDS - began)) "$*"; }

nearest() {  # nearest WORD CANDIDATE...: the candidate with the smallest edit distance
    local word=$1 candidate best="" best_distance=99 i j row last cell step
    shift
    for candidate in "$@"; do
        row=()
        for ((j = 0; j <= ${#candidate}; j++)); do row[j]=$j; done
        for ((i = 1; i <= ${#word}; i++)); do
            last=${row[0]}
            row[0]=$i
            for ((j = 1; j <= ${#candidate}; j++)); do
                step=1
                [ "${word:i-1:1}" != "${candidate:j-1:1}" ] || step=0
                cell=$((last + step))
                last=${row[j]}
                [ $((row[j] + 1)) -ge $cell ] || cell=$((row[j] + 1))
                [ $((row[j - 1] + 1)) -ge $cell ] || cell=$((row[j - 1] + 1))
                row[j]=$cell
            done
        done
        if [ "${row[${#candidate}]}" -lt "$best_distance" ]; then
            best=$candidate best_distance=${row[${#candidate}]}
        fi
    done
    printf '%s' "$best"
}

remedy() {  # remedy LOG: what to do about a failed step, from what pip wrote
    if grep -qiE 'no space left' "$1"; then
        echo "the disk is full: free some, or choose another one with --venv DIR and TMPDIR"
    elif grep -qiE 'NewConnectionError|ConnectTimeout|Temporary failure in name|Network is unreachable|Max retries|ProxyError|Connection refused|Connection reset' "$1"; then
        echo "pip cannot reach its package index: check the network, HTTPS_PROXY and 'pip config list'"
        echo "on a machine without a network: run this where there is one, on the same file system"
    elif grep -qiE 'CERTIFICATE_VERIFY_FAILED|SSLError' "$1"; then
        echo "the index's certificate is not trusted: point PIP_CERT at your site's certificates"
    elif grep -qiE 'No matching distribution|Could not find a version' "$1"; then
        echo "pip's index was not reached ('from versions: none'), or has no such version for this Python and"
        echo "machine: check the network and 'pip config list', or try another Python (--python python3.11)"
    elif grep -qiE 'THESE PACKAGES DO NOT MATCH THE HASHES|IncompleteRead|BadZipFile|zlib.error' "$1"; then
        echo "a download was damaged: run 'pip cache purge', then this again"
    elif grep -qiE 'Python\.h|command .*(gcc|cc|clang).* failed|error: Microsoft' "$1"; then
        echo "a package has no ready-made build here and could not be compiled:"
        echo "install a C compiler and Python's headers (Debian: apt-get install build-essential python3-dev)"
    elif grep -qiE 'Permission denied' "$1"; then
        echo "not allowed to write there: choose another place with --venv DIR"
    else
        echo "run this again (finished downloads are kept); the whole output is in $1"
    fi
}

run() {  # run TITLE COMMAND...: one progress line, the output in the log
    local title=$1 start=$SECONDS remedies line
    shift
    printf '%4d s  %s ... ' $((SECONDS - began)) "$title"
    if "$@" >"$log" 2>&1; then
        echo "$((SECONDS - start)) s"
        return
    fi
    echo "FAILED"
    tail -n 15 "$log" | cut -c1-300 | sed 's/^/    | /' >&2
    remedies=()
    while IFS= read -r line; do remedies+=("$line"); done < <(remedy "$log")
    die "$title failed" "${remedies[@]}"
}

# --- options --------------------------------------------------------------------------------------

while [ $# -gt 0 ]; do
    case $1 in
        --venv=* | --python=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --venv | --python)
            [ $# -ge 2 ] && [ -n "$2" ] || die "$1 needs a value" "tools/install.sh --help"
            if [ "$1" = --venv ]; then venv=$2; else python=$2; fi
            shift
            ;;
        --cuda) cuda=yes ;;
        --no-cuda) cuda=no ;;
        --test) test=yes ;;
        --check) check=yes ;;
        --help | -h)
            sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit
            ;;
        *)
            # shellcheck disable=SC2086  # the options are words
            die "unknown option $1" "did you mean $(nearest "$1" $options)? See tools/install.sh --help"
            ;;
    esac
    shift
done
given_venv=$venv
venv=${venv:-$root/tools/venv}
if [ -d "$venv" ]; then
    venv=$(cd "$venv" && pwd -P) # the environment, where tools/venv is a link to it
else
    case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
    [ ! -L "$venv" ] || rm "$venv" # a link to an environment that is gone
fi

# Kaldi and ESPnet users often carry these; each makes pip install to, or Python import from, elsewhere.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_NO_DEPS
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off

# --- an environment that is already active ----------------------------------------------------------

# Says 'VERSION MISSING...': ESPnet's version, then which of the listed packages are not there. Or fails.
active_state() {  # active_state PYTHON REQUIREMENTS...
    local interpreter=$1
    shift
    "$interpreter" - "$root" "$@" <<'PYTHON'
import importlib.metadata as metadata
import importlib.util as util
import sys

from pip._vendor.packaging.requirements import Requirement

root, *files = sys.argv[1:]
sys.path = [path for path in sys.path if path not in ("", root)]  # a working folder is no installation
version = metadata.version("espnet")
if not (util.find_spec("espnet2") and util.find_spec("torch")):
    sys.exit(1)
missing = []
for line in [line.split("#")[0].strip() for file in files for line in open(file)]:
    requirement = Requirement(line) if line else None
    if requirement and (requirement.marker is None or requirement.marker.evaluate()):
        try:
            metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{requirement.name}{requirement.specifier}")
package = util.find_spec("espnet_pl")
if not (package and package.origin):
    missing.append("espnet_pl")
elif not package.origin.startswith(root + "/"):
    version = "elsewhere"
print(version, *missing)
PYTHON
}

# Without build isolation nothing is downloaded, where the environment's setuptools is recent enough.
install_itself() {  # install_itself PYTHON
    "$1" -m pip install --no-deps --no-build-isolation -e "$root" || "$1" -m pip install --no-deps -e "$root"
}

use_active() {
    local interpreter=$active/bin/python files=("$requirements/own.txt") state version why requirement words=()
    [ $test = no ] || files+=("$requirements/test.txt" "$requirements/kernels.txt")
    state=$(active_state "$interpreter" "${files[@]}" 2>/dev/null) || return 1
    version=${state%% *}
    case $version in
        202511* | 202611*) why="" ;;
        elsewhere) why="the espnet_pl in it is another checkout's" ;;
        *) why="its ESPnet is $version, not 202511 or 202611" ;;
    esac
    if [ -n "$why" ]; then
        [ $check = yes ] || say "the active environment, $active, is left alone: $why"
        return 1
    fi
    if [ $check = yes ]; then
        [ "$state" = "$version" ] && exit 0 || exit 1
    fi
    say "using the active environment $active (ESPnet $version); nothing in it is replaced"
    [ "$state" != "$version" ] || exit 0
    for requirement in ${state#"$version"}; do
        [ "$requirement" = espnet_pl ] || words+=("$requirement")
    done
    [ ${#words[@]} -eq 0 ] || run "${words[*]}" "$interpreter" -m pip install --no-deps "${words[@]}"
    case $state in *" espnet_pl") run "espnet_pl itself" install_itself "$interpreter" ;; esac
    exec "$interpreter" -m espnet_pl.doctor
}

active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
# One that install.sh made belongs to the checkout it is in.
if [ -z "$given_venv$python" ] && [ -x "$active/bin/python" ] && [ ! -e "$active/.espnet_pl" ]; then
    use_active || true
fi

# --- is there anything to do? -----------------------------------------------------------------------

stamp=$venv/.espnet_pl

stamped() { sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true; }

# Changes with the pins, this package's metadata, the place of repository and environment, and Python.
state_of() {  # state_of CUDA
    local file files=("$venv/pyvenv.cfg" "$root/setup.py")
    for file in "$requirements"/*.txt; do
        case $file in */test.txt | */kernels.txt) ;; *) files+=("$file") ;; esac
    done
    { echo "$1 $root $venv" && cat "${files[@]}"; } 2>/dev/null | cksum
}

test_state_of() { cat "$requirements/test.txt" "$requirements/kernels.txt" | cksum; }

up_to_date() {
    [ -x "$venv/bin/python" ] && [ "$(stamped main)" = "$(state_of "$cuda")" ] || return 1
    [ $test = no ] || [ "$(stamped test)" = "$(test_state_of)" ]
}

visible_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# A login node sees no GPU and a compute node does: what was chosen once stays.
[ -n "$cuda" ] || cuda=$(stamped cuda)
[ -n "$cuda" ] || { visible_gpu && cuda=yes || cuda=no; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

if [ -n "$python" ]; then
    wanted=$(version_of "$python") || die "$python does not run" "give --python the path of a Python 3.10 to 3.13"
    [ "$(version_of "$venv/bin/python")" = "$wanted" ] || stamp=/dev/null # made again, from the Python asked for
fi
if [ $check = yes ]; then
    up_to_date && exit 0 || exit 1
fi

# Recipes started side by side share one installation; the others wait for it.
if command -v flock >/dev/null; then
    exec 9>"$root/tools/.install.lock"
    flock -n 9 || { say "waiting for another install.sh" && flock 9; }
fi
if up_to_date; then
    say "$venv is up to date"
    exit
fi

# --- a Python to make it from -----------------------------------------------------------------------

suitable() {  # suitable PYTHON: silent if it will do, else says why not
    local version
    version=$(version_of "$1") || { echo "$1 does not run" && return 1; }
    case $version in
        3.1[0-3]) ;;
        *) echo "$1 is Python $version" && return 1 ;;
    esac
    "$1" -c 'import ensurepip, venv' 2>/dev/null || {
        echo "$1 has no venv module (Debian: apt-get install python$version-venv)" && return 1
    }
}

find_python() {
    local candidate why=() reason
    for candidate in ${python:-python3.11 python3.10 python3.12 python3.13 python3 python}; do
        command -v "$candidate" >/dev/null || continue
        if reason=$(suitable "$candidate"); then
            python=$candidate
            return
        fi
        why+=("$reason")
    done
    die "no suitable Python" ${why[@]+"${why[@]}"} \
        "needed: Python 3.10, 3.11, 3.12 or 3.13 with its venv module" \
        "Debian or Ubuntu: apt-get install python3.11 python3.11-venv" \
        "without root: 'conda create -p PATH python=3.11', 'uv python install 3.11' or 'pyenv install 3.11'," \
        "then tools/install.sh --python PATH/bin/python3.11"
}

# An interrupted or outdated installation is continued; an environment of somebody else's is not touched.
made=no
stamp=$venv/.espnet_pl
if [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
    [ -e "$stamp" ] || [ "$venv" = "$root/tools/venv" ] ||
        die "$venv is there already and was not made by install.sh" \
            "choose an empty place with --venv DIR; or, if ESPnet is in it, activate it and leave --venv out"
    if suitable "$venv/bin/python" >/dev/null && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        [ -n "$python" ] && [ "$(version_of "$venv/bin/python")" != "$wanted" ] || made=yes
    fi
fi
if [ $made = yes ]; then python=$venv/bin/python; else find_python; fi
minor=$(version_of "$python")
case $minor in
    3.10 | 3.11) espnet=202511 ;;
    *) espnet=202611 ;;
esac

# --- room ---------------------------------------------------------------------------------------------

if [ "$cuda" = yes ]; then needed=8000; elif [ $test = yes ]; then needed=3500; else needed=2500; fi
mkdir -p "$(dirname "$venv")" 2>/dev/null || die "cannot make $(dirname "$venv")" "choose another place with --venv DIR"
[ -w "$(dirname "$venv")" ] || die "not allowed to write to $(dirname "$venv")" "choose another place with --venv DIR"
free=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 / 1024) }')
if [ ! -d "$venv/lib/python$minor/site-packages/espnet2" ] && [ "$free" -lt "$needed" ]; then
    die "$free MB free on the disk of $venv, about $needed MB needed" \
        "free some, or choose another disk: tools/install.sh --venv DIR"
fi

# --- install ------------------------------------------------------------------------------------------

exec 3>&2 # past the step's redirection
trap 'printf "\ninstall.sh: interrupted; run it again to continue, finished downloads are kept\n" >&3; exit 130' INT TERM
say "Python $minor, ESPnet $espnet, torch/torchaudio CUDA pair: $cuda -> $venv"
[ $made = yes ] || run "virtual environment" "$python" -m venv --clear "$venv"
echo "cuda=$cuda" >"$stamp" # incomplete until the other two lines are there
pip() { "$venv/bin/python" -m pip install "$@"; }

if [ "$cuda" = yes ]; then torch="torch-cuda"; else torch="torch"; fi
run "torch and what it needs (the longest step)" pip -r "$requirements/$torch.txt"
run "ESPnet $espnet and what it needs" pip --no-deps -r "$requirements/espnet-$espnet.txt"
if [ $test = yes ]; then
    run "test tools" pip --no-deps -r "$requirements/test.txt"
    "$venv/bin/python" -c 'import triton' 2>/dev/null ||
        run "Triton, for the tests of the kernels" pip --no-deps -r "$requirements/kernels.txt"
fi
run "espnet_pl itself" install_itself "$venv/bin/python"

# torchaudio's wheel may be linked against another CUDA than torch, or against one where torch has none.
# ESPnet needs only its Python part, and torchaudio treats a missing native library as a supported case.
if ! "$venv/bin/python" -c 'import torchaudio' >"$log" 2>&1; then
    run "import torch" "$venv/bin/python" -c 'import torch'
    rm -f "$venv"/lib/python*/site-packages/torchaudio/lib/*.so
    run "torchaudio without its native library, which does not fit this torch" \
        "$venv/bin/python" -c 'import torchaudio'
fi

if [ "$venv" != "$root/tools/venv" ] && { [ -L "$root/tools/venv" ] || [ ! -e "$root/tools/venv" ]; }; then
    ln -sfn "$venv" "$root/tools/venv" # where the recipes look
fi

OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/python" -m espnet_pl.doctor || die "the installation is not complete" "see the lines above"
if [ $test = yes ]; then test_state=$(test_state_of); else test_state=""; fi
printf 'main=%s\ntest=%s\ncuda=%s\n' "$(state_of "$cuda")" "$test_state" "$cuda" >"$stamp"
say "done; recipes find it by themselves, and by hand: . ${venv#"$PWD/"}/bin/activate"
