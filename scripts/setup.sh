#!/usr/bin/env bash
# Prepares a checkout: installs missing system packages, .venv from requirements.txt, and the jars of pom.xml below
# .local/jars. A second run only checks, in a second. Needs Linux on x86-64 and bash. On Debian 12 as root it installs
# system packages itself; elsewhere it prints which to install.
#
#   scripts/setup.sh [--quiet]
#
# To update requirements.txt after a change of requirements.in:
#   .venv/bin/uv pip compile --generate-hashes --python-version 3.11 --no-header requirements.in -o requirements.txt
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

quiet=
case "${1:-}" in
    "") ;;
    --quiet) quiet=yes ;;
    *) echo "error: $1: unknown option; usage: scripts/setup.sh [--quiet]" >&2; exit 2 ;;
esac
say() { [[ -n $quiet ]] || echo "setup: $*"; }
# Steps that take minutes are announced even with --quiet; otherwise they would look like a hang.
working() { echo "setup: $*" >&2; }
die() { echo "error: $*" >&2; exit 2; }

mkdir -p .local/bin .local/jars
exec 9>.local/setup.lock
if ! flock --nonblock 9; then
    working "waiting for another set-up of this checkout"
    flock 9
fi

# ---- system packages ------------------------------------------------------------------------------------------

has() { command -v "$1" >/dev/null 2>&1; }
# Flink 2 and Kafka 4 need Java 17 or later; an older one would fail only when they start.
java_at_hand() {
    local java=${JAVA_HOME:+$JAVA_HOME/bin/}java
    has "$java" && [[ $("$java" -version 2>&1) =~ version\ \"([0-9]+) ]] && ((BASH_REMATCH[1] >= 17))
}
redis_at_hand() { has redis-server || [[ -x .local/bin/redis-server ]]; }

missing_packages() {
    has python3.11 || echo python3.11
    has python3.11 && python3.11 -c 'import ensurepip, venv' 2>/dev/null || echo python3.11-venv
    java_at_hand || echo openjdk-17-jre-headless
    has mvn || echo maven
    # The package redis-server would also start a service on Redis's port; redis-tools has the program without it.
    redis_at_hand || has redis-check-rdb || echo redis-tools
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    if ((${#missing[@]})); then
        if [[ $(id -u) != 0 ]] || ! has apt-get; then
            die "missing: ${missing[*]} (Debian's names); install them, then run scripts/setup.sh again"
        fi
        working "installing ${missing[*]} by apt"
        export DEBIAN_FRONTEND=noninteractive
        local log=.local/apt.log
        {
            apt-get update -q && apt-get install -q -y --no-install-recommends ca-certificates "${missing[@]}"
        } >"$log" 2>&1 || { tail -n 15 "$log" >&2; die "apt could not install ${missing[*]}; all of it is in $log"; }
    fi
    # redis-check-rdb and the server are one program; its name decides what it does.
    redis_at_hand || ln -sf "$(command -v redis-check-rdb)" .local/bin/redis-server
}

# ---- Python ---------------------------------------------------------------------------------------------------

install_python_packages() {
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
        working "creating .venv"
        python3.11 -m venv --clear .venv
    fi
    local pip_log=.local/pip.log
    if ! .venv/bin/uv --version >/dev/null 2>&1; then
        .venv/bin/python -m pip --version >/dev/null 2>&1 || python3.11 -m venv --clear .venv
        .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes \
            -r <(sed -n '/^uv==/,/[^\\]$/p' requirements.txt) >"$pip_log" 2>&1 \
            || { tail -n 15 "$pip_log" >&2; die "pip could not install uv; is the package index reachable?"; }
    fi
    working "installing the packages of requirements.txt (5.5 GB the first time)"
    # Compile bytecode now. Otherwise each Flink worker would compile at its start if Python must not write bytecode.
    .venv/bin/uv pip sync -q --python .venv/bin/python --require-hashes --compile-bytecode requirements.txt \
        || die "uv could not install requirements.txt; see above"

    local site
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Makes the project importable from any folder, also for Flink's Python workers. Unlike an editable install this
    # leaves no .egg-info, and a new package needs no new install.
    echo "$root" >"$site/infertuner.pth"
    chmod +x "$site"/pyflink/bin/*.sh "$site"/pyflink/bin/flink
}

# ---- jars -----------------------------------------------------------------------------------------------------

install_jars() {
    local profile log=.local/maven.log
    for profile in connector broker; do
        working "fetching the $profile jars by Maven"
        rm -rf ".local/jars/$profile.new"
        mvn -q -B -P "$profile" dependency:copy-dependencies -DoutputDirectory="$root/.local/jars/$profile.new" \
            >"$log" 2>&1 || { tail -n 15 "$log" >&2; die "Maven could not fetch the $profile jars; see $log"; }
        rm -rf ".local/jars/$profile"
        mv ".local/jars/$profile.new" ".local/jars/$profile"
    done
}

# ---- repeat only what has changed -----------------------------------------------------------------------------

# Two stamps, so that a change of one half does not repeat the other.
python_key() { { echo "$root"; .venv/bin/python -VV; cat requirements.txt pyproject.toml scripts/setup.sh; } 2>&1 | sha256sum; }
jars_key() { cat pom.xml scripts/setup.sh | sha256sum; }
is_done() { [[ -f .local/$1.stamp && $(<".local/$1.stamp") == "$2" ]]; }

install_packages
if [[ ! -x .venv/bin/uv ]] || ! is_done python "$(python_key)"; then
    install_python_packages
    python_key >.local/python.stamp
fi
if [[ ! -d .local/jars/connector || ! -d .local/jars/broker ]] || ! is_done jars "$(jars_key)"; then
    install_jars
    jars_key >.local/jars.stamp
fi
say "ready"
