# The recipe's environment; sourced by run.sh and by every job. The same file in every recipe.
#
# The python3 that is active is used if this checkout's espnet_pl and ESPnet are installed in it,
# else tools/venv, which is made or brought up to date first where needed (tools/install.sh).

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd -P)
_venv=$_root/tools/venv

_active() {  # looks only for the files: importing ESPnet takes seconds
    [ "${VIRTUAL_ENV:-}" != "$_venv" ] && python3 - "$_root" <<'PYTHON' 2>/dev/null
import importlib.util, sys
sys.path = [path for path in sys.path if path not in ("", sys.argv[1])]
ours, espnet = map(importlib.util.find_spec, ("espnet_pl", "espnet2"))
sys.exit(not (ours and espnet and ours.origin.startswith(sys.argv[1] + "/")))
PYTHON
}

if ! _active; then
    "$_root/tools/install.sh" --check || "$_root/tools/install.sh" || return 1
    # install.sh may have completed the active environment instead
    _active || PATH=$_venv/bin:$PATH
fi
unset -f _active
unset _root _venv

# The recipes' networks are small: a second thread is slower than none, and many jobs run side by side.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$OMP_NUM_THREADS}

# Sorted by byte, as Kaldi's data folders are.
case $(locale -a 2>/dev/null) in
    *C.[Uu][Tt][Ff]*) export LC_ALL=C.UTF-8 ;;
    *) export LC_ALL=C ;;
esac
export PATH PYTHONIOENCODING=UTF-8 PYTHONUNBUFFERED=1 # logs appear as they are written
