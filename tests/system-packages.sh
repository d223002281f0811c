#!/usr/bin/env bash
# Installs what some tests need of the system: its PostgreSQL (built with TLS, with contrib), PgBouncer, Prometheus,
# and Chromium with fonts.
# Nothing is left running. Without root or apt it says what will be skipped; with CI set, those tests fail instead.
set -euo pipefail

have_postgres() { compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || compgen -G '/usr/pgsql-*/bin/postgres' >/dev/null; }
have_pgbouncer() { command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ]; }
have_chromium() { command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; }
have_prometheus() { command -v prometheus >/dev/null && command -v promtool >/dev/null; }

missing() {
    local names=()
    have_postgres || names+=(postgresql)
    have_pgbouncer || names+=(pgbouncer)
    have_prometheus || names+=(prometheus)
    have_chromium || names+=(chromium fonts-liberation)
    echo "${names[*]-}"
}

wanted=$(missing)
[ -n "$wanted" ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "== not installed here: $wanted. Tests that need them are skipped and say so."
    echo "   To run them too: apt-get install $wanted (as root), then make test again."
    exit 0
fi

echo "== installing for the tests: $wanted (apt-get)"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    # While this file is there, Debian's packages start no service.
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -qq --no-install-recommends "$@" </dev/null >/dev/null; }
{
    apt-get update -qq
    if [[ " $wanted " == *" postgresql "* ]]; then
        # Only its programs are wanted, no server of its own.
        install postgresql-common
        sed -i 's/^#\?create_main_cluster *=.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
    fi
    # shellcheck disable=SC2086
    install $wanted
} || echo "== apt-get failed; tests that need $(missing) are skipped and say so" >&2
