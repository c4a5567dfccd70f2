#!/usr/bin/env bash
# Makes .venv from a lock file. `make install` runs it, and every other target (and .ci/run) stands on that.
#   DEVICE=cpu|gpu   which lock file; without it, gpu where `nvidia-smi -L` finds one
#   PYTHON=...       which interpreter; without it, the newest supported one on the PATH
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "install: $*" >&2; exit 1; }

device=${DEVICE:-}
if [ -z "$device" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then device=gpu; else device=cpu; fi
fi
case $device in
    cpu) versions="3.13 3.12 3.11" ;;
    gpu) versions="3.12 3.11" ;; # vLLM's CUDA build has no wheels for 3.13 yet (cuda-python)
    *) fail "DEVICE=$device is not known; say DEVICE=cpu or DEVICE=gpu" ;;
esac
[ "$(uname -sm)" = "Linux x86_64" ] || fail "the lock files are for Linux on x86_64, this is $(uname -sm)"

suits() { # is "$1" a supported Python that can make a virtual environment?
    [[ " $versions " == *" $("$1" -c 'import sys, ensurepip, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true) "* ]]
}

if ! { [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 && suits .venv/bin/python; }; then
    python=
    for candidate in ${PYTHON:-$(printf 'python%s ' $versions) python3 python}; do
        if suits "$candidate"; then python=$candidate; break; fi
    done
    [ -n "$python" ] || fail "found no Python ${versions// / or } with the venv module (looked for: ${PYTHON:-$(printf 'python%s, ' $versions)python3}; \
python3 is $(python3 --version 2>&1 || echo missing)). Install one (on Debian and Ubuntu: apt install python3.11 python3.11-venv) or name it: make install PYTHON=/path/to/python3.11"
    "$python" -m venv --clear .venv
fi

echo "install: $(.venv/bin/python --version), requirements/$device.lock (a few minutes the first time)"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pip install -qq --no-deps -r "requirements/$device.lock" ||
    fail "pip could not install requirements/$device.lock (its error is above); 'make install' goes on from there"

# Where pip was offered no CPU build of torch it took the default build, which cannot be imported without its CUDA libraries.
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "install: pip found no CPU build of torch; adding the CUDA libraries of the default build (several GB)"
    pip install -qq "$(grep -o '^torch==[^ ]*' "requirements/$device.lock")" || fail "pip could not install torch with its libraries"
fi

pip install -qq --no-deps --no-build-isolation -e . || fail "pip could not install raykd itself (its error is above)"
.venv/bin/python -c 'import torch, transformers, raykd' || fail "the environment is incomplete: delete .venv and run 'make install' again"
echo "$device" >.venv/installed
