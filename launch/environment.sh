# shellcheck shell=bash
# Sourced by the scripts beside it. `prepare [EXTRA]` goes to the checkout and makes .venv there with the package and,
# if named, one extra of pyproject.toml. It does nothing that has been done before.

prepare() {
    local extra=${1:-} python wanted
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
    if ! .venv/bin/python -c '' 2>/dev/null; then
        python=$(find_python) || {
            echo "error: dit_jax needs Python 3.11 or newer with the venv module; none was found on PATH" >&2
            exit 2
        }
        echo "== making .venv with $("$python" --version) ($python)"
        rm -rf .venv
        "$python" -m venv .venv
    fi
    wanted=$(cat pyproject.toml requirements.txt <(echo "$extra") | cksum | tr ' ' '-')
    if [ ! -e ".venv/installed-$wanted" ]; then
        echo "== installing dit_jax and what it needs into .venv (a minute or two)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
        touch ".venv/installed-$wanted"
    fi
}

find_python() {
    local name path
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        path=$(command -v "$name") || continue
        if "$path" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$path"
            return
        fi
    done
    return 1
}
