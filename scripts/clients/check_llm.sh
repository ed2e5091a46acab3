# The `llm` command line tool, with the engine as an extra OpenAI model.
set -euo pipefail
export LLM_USER_PATH=$WORK/llm
mkdir -p "$LLM_USER_PATH"
cat >"$LLM_USER_PATH/extra-openai-models.yaml" <<YAML
- model_id: local
  model_name: $MODEL
  api_base: $BASE_URL
- model_id: local-completion
  model_name: $MODEL
  api_base: $BASE_URL
  completion: true
YAML
streamed=$(llm -m local --key unused -o temperature 0 -o max_tokens 20 "What is threading.Lock?")
whole=$(llm -m local --key unused --no-stream -o temperature 0 -o max_tokens 20 "What is threading.Lock?")
[ "$streamed" = "$whole" ]
plain=$(llm -m local-completion --key unused -o temperature 0 -o max_tokens 12 "Return the")
[ -n "$plain" ]
echo "llm: '$whole' | '$plain'"
