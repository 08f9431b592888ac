# shellcheck shell=bash
# What tests/run and tests/stack need of Python, in a virtual environment of this checkout. To be sourced, with `root`
# set to the checkout.

venv=${root:?}/tests/.venv

# Installs tests/requirements.txt, unless that was done.
install_requirements() {
    local wanted=$root/tests/requirements.txt
    cmp -s "$wanted" "$venv/requirements.txt" && return
    echo "installing into tests/.venv: $(grep -v '^#' "$wanted" | tr '\n' ' ')" >&2
    [[ -x $venv/bin/python ]] || python3 -m venv "$venv" ||
        { echo "could not make tests/.venv; remove it, install python3-venv, and run again" >&2 && return 1; }
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted" ||
        { echo "could not install tests/requirements.txt; is a package index reachable?" >&2 && return 1; }
    cp "$wanted" "$venv/requirements.txt"
}

have_mongodb_server() {
    command -v mongod >/dev/null || command -v secantusd-rs >/dev/null
}

# MongoDB is in no package registry. SecantusDB speaks its protocol, on its storage engine; it is a process of its own,
# and nothing of it is linked. Goes into the environment that install_requirements made.
install_mongodb_server() {
    local wanted=SecantusDB==0.7.0b3
    [[ $(cat "$venv/secantusdb" 2>/dev/null) != "$wanted" ]] || return 0
    echo "installing into tests/.venv: $wanted, since neither mongod nor secantusd-rs is here" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$wanted" ||
        { echo "could not install $wanted; install MongoDB 8, or is a package index reachable?" >&2 && return 1; }
    echo "$wanted" >"$venv/secantusdb"
}
