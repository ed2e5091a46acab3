# lm-eval on two local tasks; then each log-likelihood and each generation is compared with what transformers computes.
set -euo pipefail
tasks=$WORK/tasks
mkdir -p "$tasks"
python - "$tasks" <<'PY'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
choices = [
    ("Return the", [" number of", " banana the", " length of"], 0),
    ("The file object", [" is", " purple", " to be"], 0),
    ("Raises", [" ValueError", " the sun", " an error"], 0),
    ("A list of", [" strings", " the the", " all"], 0),
]
prompts = ["Return the", "The default", "This function", "If the argument"]
write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
write("choice.jsonl", [{"prompt": p, "choices": c, "answer": a} for p, c, a in choices])
write("generate.jsonl", [{"prompt": p, "answer": ""} for p in prompts])
common = "test_split: test\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\nmetadata: {version: 1}\n"
data = lambda name: f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}}}}}\n"
(folder / "choice.yaml").write_text(
    f"task: tandem_choice\noutput_type: multiple_choice\ndoc_to_choice: '{{{{choices}}}}'\n{data('choice.jsonl')}{common}"
    "target_delimiter: ''\nmetric_list: [{metric: acc}]\n")
(folder / "generate.yaml").write_text(
    f"task: tandem_generate\noutput_type: generate_until\n{data('generate.jsonl')}{common}"
    "generation_kwargs: {until: ['@@'], max_gen_toks: 24, do_sample: false, temperature: 0}\n"
    "metric_list: [{metric: exact_match}]\n")
PY
lm_eval run --model local-completions --tasks tandem_choice,tandem_generate --include_path "$tasks" --log_samples \
    --model_args "model=$MODEL,base_url=$BASE_URL/completions,tokenizer=$MODEL_DIR,tokenizer_backend=huggingface,num_concurrent=4,max_length=512" \
    --output_path "$WORK/lm_eval" >"$WORK/lm_eval.log" 2>&1 || { tail -n 40 "$WORK/lm_eval.log"; exit 1; }
"$ROOT/.venv/bin/python" "$ROOT/scripts/clients/compare_lm_eval.py" "$WORK/lm_eval" "$MODEL_DIR"
