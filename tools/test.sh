#!/usr/bin/env bash
# Runs all tests, on all cores: tools/test.sh [PYTEST_OPTION...], for example tools/test.sh test/losses -k ctc -n 1
# Installs what they need first (tools/install.sh --test). Real speech is tested where ESPNET_PL_SHARED
# names a folder that has it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/install.sh --test
. egs/mini_alnum/pl1/path.sh

wrong=""
check() { # check COMMAND...: shown, and remembered if it fails, so that one run finds everything
    echo "$*"
    python3 -m "$@" || wrong="$wrong, $*"
}
check ruff check .
check ruff format --check .
echo "shellcheck"
shell_scripts=$(find . -path ./tools/venv -prune -o -path ./.git -prune -o -name '*.sh' -print)
# shellcheck disable=SC2086  # file names without spaces
shellcheck $shell_scripts .ci/run || wrong="$wrong, shellcheck"

result=0
[ -z "$wrong" ] || { echo "FAILED: ${wrong#, }" >&2 && result=1; }
# By files, in their order: the tests of a file share what took time to make, and the long files come early.
python3 -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@" || result=$?
exit $result
