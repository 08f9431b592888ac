#!/usr/bin/env bash
# Makes the secrets that compose.yaml mounts, in compose/secrets/ or the directory given. What is there already is left
# as it is: to exchange a secret, remove its file and run this again.
set -euo pipefail

directory=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/secrets}
command -v openssl >/dev/null || { echo "make-secrets.sh: openssl is missing; install the package openssl" >&2 && exit 1; }

umask 077
mkdir -p "$directory"
cd "$directory"

# Writes standard input to a file that is not there yet, all of it or nothing.
make() {
    local name=$1
    if [[ -s $name ]]; then
        cat >/dev/null
        echo "kept $directory/$name"
        return
    fi
    cat >"$name.new"
    # Containers read their secrets as other users than the one that made them; the directory keeps everybody else out.
    chmod 0444 "$name.new"
    mv "$name.new" "$name"
    echo "made $directory/$name"
}

openssl rand -hex 32 | make cluster_key
openssl rand -hex 32 | make token_secret
openssl rand -hex 16 | make grafana_password
demo_key_is_new=no
[[ -s demo_api_key ]] || demo_key_is_new=yes
openssl rand -hex 32 | make demo_api_key

# Where alerts go: put the address of a Slack-compatible webhook in its place. Until then they stand on Alertmanager's own
# page, and each failed notification in its log.
echo "http://127.0.0.1:9/" | make alert_webhook_url

# Delivery knows keys by their hash alone. Add a line for each back end of yours.
hash=$(printf %s "$(cat demo_api_key)" | openssl dgst -sha256 -r | cut -d' ' -f1)
if [[ $demo_key_is_new == yes ]] && grep -qs '"demo"' api_keys; then
    rm -f demo_api_key
    echo "make-secrets.sh: $directory/api_keys has the hash of a demo key that is gone; remove its entry, or the file" >&2
    exit 1
fi
echo "[{ name = \"demo\", sha256 = \"$hash\" }]" | make api_keys

# A certificate for trying it out; clients have to be told to trust it. Put your own in its place.
if [[ ! -s tls_key || ! -s tls_cert ]]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=localhost \
        -addext "subjectAltName=DNS:localhost,DNS:nginx,IP:127.0.0.1" -keyout signed_key -out signed_cert 2>/dev/null
    rm -f tls_key tls_cert
    make tls_key <signed_key
    make tls_cert <signed_cert
    rm -f signed_key signed_cert
fi
