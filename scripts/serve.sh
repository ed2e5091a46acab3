#!/usr/bin/env bash
# Serve a model: ./scripts/serve.sh [engine-launch flags]. Without a model: models/demo, on 127.0.0.1:8000 by default.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
(cd "$root" && source scripts/setup.sh)

model=(--model "$root/models/demo")
for argument in "$@"; do
    case "$argument" in
    --model | --model=* | --model-path | --model-path=* | --help | -h | --version) model=() ;;
    esac
done
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    model=() # the first argument is the model
fi
exec "$root/.venv/bin/engine-launch" ${model[@]+"${model[@]}"} "$@"
