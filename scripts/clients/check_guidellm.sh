# guidellm: synthetic prompts to both endpoints, streamed, one and several at a time; no request may fail.
set -euo pipefail
for format in /v1/chat/completions /v1/completions; do
    report=$WORK/guidellm$(tr / - <<<"$format").json
    guidellm run --disable-progress \
        --backend "kind=openai_http,target=${BASE_URL%/v1},model=$MODEL,request_format=$format" \
        --data kind=synthetic_text,prompt_tokens=64,output_tokens=24 --tokenizer "kind=hf_auto,model=$MODEL_DIR" \
        --profile kind=concurrent,streams=1 --override profile.streams 1,4 --constraint kind=max_requests,count=12 \
        --output "kind=json,path=$report" >"$WORK/guidellm.log" 2>&1 || { tail -n 40 "$WORK/guidellm.log"; exit 1; }
    python - "$report" "$format" <<'PY'
import json, sys
for run in json.load(open(sys.argv[1]))["benchmarks"]:
    requests, metrics = run["metrics"]["request_totals"], run["metrics"]
    assert requests["successful"] == 12 and not requests["errored"], requests
    told = {name: metrics[name]["successful"] for name in
            ("output_token_count", "time_to_first_token_ms", "inter_token_latency_ms", "output_tokens_per_second")}
    assert told["output_token_count"]["mean"] == 24, told["output_token_count"]
    print(f"guidellm: {sys.argv[2]}, {run['config']['strategy']['streams']} at a time: {requests['successful']} requests,"
          f" none failed, 24 tokens each, TTFT p50 {told['time_to_first_token_ms']['median']:.1f} ms,"
          f" ITL p50 {told['inter_token_latency_ms']['median']:.1f} ms")
PY
done
