#!/usr/bin/env bash
# The weights that LEPTON ships, from prepared data to files: train, tune the drafter, calibrate, export in int8, measure.
# Seeds and lengths are chosen on $DATA/val; what the model card says is measured on $REPORT, which nothing was chosen on.
#   DATA=folder of shard_*.npy with val/   REPORT=folder of shard_*.npy with val/   OUT=folder (default: shipped-weights)
#   bash benchmarks/shipped_weights.sh micro --max_steps 6000 --batch_size 64 --grad_accum 1     flags are train.py's
set -euo pipefail
OUT=${OUT:-shipped-weights}
PYTHON=${PYTHON:-python3}
size=$1
shift
mkdir -p "$OUT"
begun=$SECONDS
say() { echo "[$((SECONDS - begun)) s] $*"; }
lepton() { "$PYTHON" -m lepton "$@"; }

"$PYTHON" train.py --model_size "$size" --data_dir "$DATA" --checkpoint_dir "$OUT/run" "$@" > "$OUT/train.txt" 2>&1
say "trained: $(grep -E 'validation loss' "$OUT/train.txt" | tail -n 1)"
cp "$OUT/run/final.pt" "$OUT/model.pt"
of=(--checkpoint "$OUT/model.pt" --data_dir "$DATA")
lepton tune "${of[@]}" ${TUNE:-} > "$OUT/tune.txt"
say "tuned: $(grep temperature "$OUT/tune.txt" | tr -s ' \n' ' ')"
lepton calibrate "${of[@]}" > "$OUT/calibrate.txt"
# A promise that the other half of the text breaks is not kept; the others then stand.
for risk in 0.05 0.1 0.2; do lepton calibrate "${of[@]}" --risk $risk >> "$OUT/calibrate.txt" || say "no risk $risk"; done
for cost in 0.01 0.02 0.05; do
  lepton calibrate "${of[@]}" --max_cost $cost >> "$OUT/calibrate.txt" || say "no cost $cost"
done
say "calibrated"
lepton export --checkpoint "$OUT/model.pt" --dtype int8 --max_file_mb 15 --out "$OUT/model.safetensors" --force
weights=$(find "$OUT" -name 'model*.safetensors' | sort | head -n 1)
for file in "$OUT/model.pt" "$weights"; do
  lepton eval --checkpoint "$file" --data_dir "$REPORT" ${EVAL:---speculation 128} > "$OUT/eval-${file##*.}.txt"
  say "$file: $(head -n 3 "$OUT/eval-${file##*.}.txt" | tail -n 2 | tr -s ' \n' ' ')"
done
