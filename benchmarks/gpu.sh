#!/usr/bin/env bash
# Every figure that only a GPU can show, in one go; about a quarter of an hour on an H100. Results go to the folder given:
#   benchmarks/gpu.sh benchmarks/results/h100
# The targets: share of the matrix rate (mfu) of a training step at least 0.45 for SDXL and 0.40 for SD 1.5, of drawing at
# least 0.50; twice the plain loop's pairs per second; less than 5 % of a round outside its counted phases; peak memory of
# SDXL at 1024 px, one pair in a step: at most 16 GB with LoRA, 40 GB with all weights and a factored optimizer.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?give a folder for the results}
python=${PYTHON:-python}
failed=()
mkdir -p "$out"

measure() {  # NAME SCRIPT ARGUMENTS...
    local name=$1 script=$2
    shift 2
    echo "== $name"
    if ! "$python" "benchmarks/$script.py" --device cuda --json "$out/$name.json" "$@" >"$out/$name.log" 2>&1; then
        failed+=("$name")
        tail -n 3 "$out/$name.log"
    fi
}

small=(--batch_size 1 --steps 8 --pairs 8 --gradient_checkpointing true)
measure round_sdxl_lora round --model sdxl "${small[@]}" --use_lora true
measure round_sdxl_factored round --model sdxl "${small[@]}" --optimizer adafactor
measure round_sdxl_fused round --model sdxl "${small[@]}" --optimizer adafactor --fused_backward true --max_grad_norm 0
measure train_sdxl train_step --model sdxl --batch_size 4 --repeats 8 --fixed_draws --compile blocks --only_ours
measure train_sdxl_plain train_step --model sdxl --batch_size 2 --repeats 5 --gradient_checkpointing
measure train_sd15 train_step --model sd15 --batch_size 16 --repeats 8 --fixed_draws --compile blocks
measure generate_sdxl generate --model sdxl --batch_size 8 --num_inference_steps 25 --repeats 2 --compile blocks
measure generate_sd15 generate --model sd15 --batch_size 32 --num_inference_steps 25 --repeats 2 --compile blocks
measure round_sd15 round --model sd15 --batch_size 16 --steps 32 --pairs 128

# The toy in parts on one GPU, by accelerate's own FSDP: it must end, and load
echo "== in_parts"
if ! "$python" -m accelerate.commands.launch --config_file training/accelerate/fsdp2.yaml --num_processes 1 \
    training/train_spin_sdxl.py --config training/configs/toy_sdxl.yaml --max_train_samples 32 --rounds 1 \
    --max_train_steps 4 --compare_with "[]" --validation_prompts null --scorers null --report_to none \
    --output_dir "$out/in_parts" >"$out/in_parts.log" 2>&1; then
    failed+=(in_parts)
    tail -n 3 "$out/in_parts.log"
fi
rm -rf "$out/in_parts"

if [ ${#failed[@]} -gt 0 ]; then
    echo "Without a result: ${failed[*]} (the reasons are in $out/*.log)"
    exit 1
fi
