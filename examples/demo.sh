#!/usr/bin/env bash
# The main job, whole: a daemon on the embedded model, a signed job file, live progress, PNGs and a manifest.
# Run it by `make demo`. It works in this checkout's own spool/ and outputs/, and leaves a running daemon as it is.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

step imagend init .

if imagend status >/dev/null 2>&1; then
    echo "(a daemon is running already; the job goes to it)"
else
    printf '\n\033[1m$ imagend serve &\033[0m   (its log: spool/demo.log)\n'
    imagend serve 2>spool/demo.log &
    trap 'kill $! 2>/dev/null; wait' EXIT
    until imagend status >/dev/null 2>&1; do
        kill -0 $! || { cat spool/demo.log >&2; exit 1; }
        sleep 0.1
    done
fi

step imagend submit generate --prompt "a large red circle on a blue background" \
    --num-inference-steps 20 --guidance-scale 4 --seed 7 --count 4 --label demo --wait

printf '\nThe PNGs and the manifest lie where the lines above say; what is in the manifest: jq . FILE\n'
