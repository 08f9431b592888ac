# Shorthands; everything works without just.

# List the verbs.
default:
    @just --justfile {{ justfile() }} --list

# Start everything in one process, as the README does.
standalone *options:
    cargo run --release -- standalone {{ options }}

# Format the sources.
fmt:
    cargo fmt --all

# Lints, with warnings as errors.
lint:
    cargo clippy --workspace --all-targets -- -D warnings

# The API documentation, with warnings as errors.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# Versions, licences and sources of the dependencies.
deny:
    cargo deny check bans licenses sources

# Every suite, or one: `just test`, `just test unit`.
test *suite:
    tests/run {{ suite }}

# The edge's benchmark.
load *options:
    tests/run load {{ options }}

# All that CI does.
ci:
    bash .ci/run
