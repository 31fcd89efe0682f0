#!/usr/bin/env bash
# The weights that LEPTON ships, from prepared data to files: train, tune the drafter, round to int8, calibrate, measure.
# Seeds and lengths are chosen on $DATA/val; what the model card says is measured on $REPORT, which nothing was chosen on.
#   DATA=folder of shard_*.npy with val/   REPORT=folder of shard_*.npy with val/   OUT=folder (default: shipped-weights)
#   SOURCES=folder of the same text as $REPORT, NAME.jsonl.xz for each source (default: losses are not split by source)
#   bash benchmarks/shipped_weights.sh micro --max_steps 6000 --batch_size 64 --grad_accum 1     flags are train.py's
# $OUT then holds the weights, model-0000N-of-0000M.safetensors, and a JSON file a step, of which
#   python -m benchmarks.model_card $OUT --results benchmarks/results/DATE-shipped-weights.json
# makes the model card.
set -euo pipefail
OUT=${OUT:-shipped-weights}
PYTHON=${PYTHON:-python3}
size=$1
command="bash benchmarks/shipped_weights.sh $*"
shift
mkdir -p "$OUT"
rm -f "$OUT"/*.json "$OUT"/*.jsonl
begun=$SECONDS
say() { echo "[$((SECONDS - begun)) s] $*"; }
lepton() { "$PYTHON" -m lepton "$@" 2>> "$OUT/log.txt"; } # what is not JSON

"$PYTHON" train.py --model_size "$size" --data_dir "$DATA" --checkpoint_dir "$OUT/run" "$@" --json \
  > "$OUT/train.json" 2> "$OUT/train.txt"
say "trained: $(grep -E 'validation loss' "$OUT/train.txt" | tail -n 1)"
cp "$OUT/run/final.pt" "$OUT/model.pt"
lepton tune --checkpoint "$OUT/model.pt" --data_dir "$DATA" ${TUNE:-} --json > "$OUT/tune.json" \
  || say "tune: its drafter stays as it was"
say "tuned"
# What ships is rounded, so that is calibrated: a promise is of these numbers.
lepton export --checkpoint "$OUT/model.pt" --dtype int8 --out "$OUT/rounded.safetensors" --force --json > /dev/null
of=(--checkpoint "$OUT/rounded.safetensors" --data_dir "$DATA" --json)
lepton calibrate "${of[@]}" > "$OUT/calibrate.json" || say "calibrate: what training fitted stays"
# A promise that the other half of the text breaks is not kept; the others then stand.
for risk in 0.05 0.1 0.2; do lepton calibrate "${of[@]}" --risk $risk >> "$OUT/risks.jsonl" || say "no risk $risk"; done
for cost in 0.01 0.02 0.05; do
  lepton calibrate "${of[@]}" --max_cost $cost >> "$OUT/costs.jsonl" || say "no cost $cost"
done
say "calibrated"
lepton export --checkpoint "$OUT/rounded.safetensors" --dtype int8 --max_file_mb 15 --out "$OUT/model.safetensors" \
  --force --json > "$OUT/export.json"
weights=$(find "$OUT" -name 'model*.safetensors' | sort | head -n 1)
for file in "$OUT/model.pt" "$weights"; do
  name="$OUT/eval-${file##*.}.json"
  lepton eval --checkpoint "$file" --data_dir "$REPORT" ${EVAL:---speculation 128} --json > "$name"
  say "$file: $(head -c 300 "$name")"
done
for text in ${SOURCES:+"$SOURCES"/*.jsonl.xz}; do
  name=$(basename "$text" .jsonl.xz)
  lepton eval --checkpoint "$weights" --text "$text" --json > "$OUT/source-$name.json"
  say "$name: $(head -c 300 "$OUT/source-$name.json")"
done
COMMAND="$command" SECONDS_TAKEN=$((SECONDS - begun)) "$PYTHON" - > "$OUT/run.json" <<'END'
import json
import os
import platform

import torch

from lepton import __version__

print(json.dumps({
    "command": os.environ["COMMAND"],
    "tune_flags": os.environ.get("TUNE", ""),
    "eval_flags": os.environ.get("EVAL", "--speculation 128"),
    "seconds": int(os.environ["SECONDS_TAKEN"]),
    "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "lepton": __version__},
}))
END
say "done"
