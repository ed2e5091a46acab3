# guidellm: a short benchmark, streamed, that must end without a failed request.
set -euo pipefail
cd "$WORK"
guidellm benchmark run --target "${BASE_URL%/v1}" --model "$MODEL" --processor "$MODEL_DIR" --profile concurrent --rate 4 \
    --max-requests 16 --data "prompt_tokens=32,output_tokens=16" --output-path "$WORK/guidellm.json" \
    --disable-console-interactive >"$WORK/guidellm.log" 2>&1 || { tail -n 40 "$WORK/guidellm.log"; exit 1; }
python - "$WORK/guidellm.json" <<'PY'
import json, sys
run = json.load(open(sys.argv[1]))["benchmarks"][0]
requests = run["requests"]
good, bad = len(requests["successful"]), len(requests["errored"])
print(f"guidellm: {good} requests succeeded, {bad} failed")
assert good == 16 and bad == 0
PY
