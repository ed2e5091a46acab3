#!/usr/bin/env bash
# Runs real clients of the OpenAI API against a live engine: the demo model on the CPU, in float32, with a short context,
# since schemathesis asks for all of it, 128 times.
#
#     scripts/clients/run.sh                      all of them
#     scripts/clients/run.sh openai lm_eval       some
#
# They get a virtual environment of their own in scripts/clients/.venv; the engine runs from .venv. Ends with 1 if one
# of them fails.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
HERE=$ROOT/scripts/clients
ALL=(openai litellm langchain llm guidellm lm_eval schemathesis)
MODEL=demo MODEL_DIR=$ROOT/models/demo WORK=$(mktemp -d)
export ROOT MODEL MODEL_DIR WORK HF_HUB_OFFLINE=1 LITELLM_LOCAL_MODEL_COST_MAP=True

stamp=$(sha256sum "$HERE/requirements.txt" | cut -d' ' -f1)
if [ "$(cat "$HERE/.venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    [ -x "$HERE/.venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$HERE/.venv"
    "$HERE/.venv/bin/pip" install -q -r "$HERE/requirements.txt"
    echo "$stamp" >"$HERE/.venv/stamp"
fi

"$ROOT/.venv/bin/python" -P -m frontend.launch "$MODEL_DIR" --device cpu --dtype float32 --max-model-len 512 --port 0 >"$WORK/engine.out" 2>"$WORK/engine.log" &
engine=$!
trap 'kill $engine 2>/dev/null && wait $engine; rm -rf "$WORK"' EXIT
until grep -qs "^Serving" "$WORK/engine.out"; do
    kill -0 $engine 2>/dev/null || { cat "$WORK/engine.log"; exit 1; }
    sleep 0.2
done
BASE_URL=$(grep -o 'http://[^ ]*/v1' "$WORK/engine.out")
export BASE_URL PATH=$HERE/.venv/bin:$PATH

failed=()
for name in "${@:-${ALL[@]}}"; do
    echo "== $name"
    if [ -f "$HERE/check_$name.py" ]; then
        timeout 300 "$HERE/.venv/bin/python" "$HERE/check_$name.py" || failed+=("$name")
    else
        timeout 300 bash "$HERE/check_$name.sh" || failed+=("$name")
    fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
