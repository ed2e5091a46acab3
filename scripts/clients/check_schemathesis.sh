# schemathesis: every check of its own against what /openapi.json promises.
set -euo pipefail
schemathesis --config-file "$ROOT/tests/schemathesis.toml" run "${BASE_URL%/v1}/openapi.json" --checks all --request-timeout 120 --max-response-time 120 --max-examples "${EXAMPLES:-30}" \
    >"$WORK/schemathesis.log" 2>&1 || { tail -n 60 "$WORK/schemathesis.log"; exit 1; }
tail -n 12 "$WORK/schemathesis.log"
