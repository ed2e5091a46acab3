# Makes .venv with the locked packages; sourced by the other scripts from the repository root. Idempotent: when neither
# pyproject.toml nor constraints.txt nor the interpreter changed since the last run, it costs one hash.

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1). Set PYTHON to one." >&2
    return 1
}

install_locked() {
    local torch_pin
    torch_pin=$(grep '^torch==' constraints.txt)
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
    echo "setup: installing ${torch_pin} and the locked packages into .venv (once; minutes on a slow line)" >&2
    # torch goes first and alone, so that no other package can choose its build.
    .venv/bin/python -m pip install -qq -c constraints.txt "$torch_pin"
    .venv/bin/python -m pip install -qq -c constraints.txt -e '.[test]'
}

set_up() {
    local stamp=.venv/setup-stamp wanted python
    wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        if ! "$python" -m venv .venv; then
            echo "setup: $python cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2
            return 1
        fi
    fi
    install_locked
    echo "$wanted" >"$stamp"
}

# Two scripts started at once must not install into the same folder together.
exec 9<pyproject.toml
flock 9
set_up
exec 9>&-
