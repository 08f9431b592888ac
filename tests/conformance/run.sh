#!/usr/bin/env bash
# Runs the WebSocket conformance suite (cases 1 to 10: everything but compression) against the echo server of the
# edge's codec. The last line is "N passed, N failed"; the exit status is 1 when a case failed,
# and 2 when the suite did not run to its end.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
out=$root/tests/.out/conformance
venv=$root/tests/.venv
suite='kosoku==0.1.0'
# Cases 1 to 10 of that version.
cases=301

if [[ ! -x $venv/bin/kosoku ]]; then
    [[ -x $venv/bin/python ]] || python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$suite"
fi

rm -rf "$out"
mkdir -p "$out"

cd "$root"
# The packages of the test runs, so that cargo chooses the same features and builds no dependency twice.
cargo build --quiet --locked --workspace --exclude sanjay-tests --bins --examples
target=$(cargo metadata --format-version 1 --no-deps |
    "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')

"$target/debug/examples/echo" --port 0 >"$out/server.log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT

# The server prints its address once it listens; the wait ends early when it has died.
address=
for _ in $(seq 100); do
    address=$(sed -n 's/^listening //p' "$out/server.log")
    [[ -n $address ]] && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
if [[ -z $address ]]; then
    echo "the echo server did not start:" >&2
    cat "$out/server.log" >&2
    exit 2
fi

# The suite's status alone decides nothing: the report must be there and whole, and the summary judges its cases.
status=0
include=()
for group in 1 2 3 4 5 6 7 9 10; do
    include+=(-i "$group.*")
done
"$venv/bin/kosoku" -m fuzzingclient -p 2 -o "$out/report" "${include[@]}" "$address" >"$out/suite.log" 2>&1 ||
    status=$?

if ! kill -0 "$server" 2>/dev/null; then
    echo "the echo server died during the suite:" >&2
    cat "$out/server.log" >&2
    exit 2
fi
if [[ ! -f $out/report/index.json ]]; then
    echo "the suite ended with status $status and wrote no report:" >&2
    tail -n 20 "$out/suite.log" >&2
    exit 2
fi
"$venv/bin/python" "$root/tests/conformance/summary.py" "$out/report/index.json" "$cases"
