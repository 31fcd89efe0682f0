#!/usr/bin/env bash
# The weights that LEPTON ships, from prepared data to files: train, tune the drafter, round to int8, calibrate, measure.
# Seeds and lengths are chosen on $DATA/val; what the model card says is measured on $REPORT, which nothing was chosen on.
#   DATA=folder of shard_*.npy with val/   REPORT=folder of shard_*.npy with val/   OUT=folder (default: shipped-weights)
#   SOURCES=folder of the same text as $REPORT, NAME.jsonl.xz for each source (default: losses are not split by source)
#   TUNE=flags of tune, or "no"   STAGE=train, finish, or both (default): the second can run elsewhere, on a CPU. It takes
#   all of $OUT but run/ and model.pt.
#   bash benchmarks/shipped_weights.sh micro --max_steps 6000 --batch_size 64 --grad_accum 1     flags are train.py's
# $OUT then holds the weights, model-0000N-of-0000M.safetensors, and a JSON file a step, of which
#   python -m benchmarks.model_card $OUT --results benchmarks/results/DATE-shipped-weights.json
# makes the model card.
set -euo pipefail
OUT=${OUT:-shipped-weights}
PYTHON=${PYTHON:-python3}
STAGE=${STAGE:-both}
size=$1
command="bash benchmarks/shipped_weights.sh $*"
shift
mkdir -p "$OUT"
begun=$SECONDS
say() { echo "[$((SECONDS - begun)) s] $*"; }
lepton() { "$PYTHON" -m lepton "$@" 2>> "$OUT/log.txt"; } # what is not JSON
first() { find "$OUT" -name "$1*.safetensors" | sort | head -n 1; }

train() {
  rm -f "$OUT"/*.json "$OUT"/*.jsonl "$OUT"/*.safetensors
  "$PYTHON" train.py --model_size "$size" --data_dir "$DATA" --checkpoint_dir "$OUT/run" "$@" --json \
    > "$OUT/train.json" 2> "$OUT/train.txt"
  say "trained: $(grep -E 'validation loss' "$OUT/train.txt" | tail -n 1)"
  cp "$OUT/run/final.pt" "$OUT/model.pt"
  : > "$OUT/tune.json" # empty: its drafter stays as it was
  if [ "${TUNE:-}" != no ]; then
    lepton tune --checkpoint "$OUT/model.pt" --data_dir "$DATA" ${TUNE:-} --json > "$OUT/tune.json" \
      || say "tune: its drafter stays as it was"
    say "tuned"
  fi
  lepton export --checkpoint "$OUT/model.pt" --dtype int8 --max_file_mb 15 --out "$OUT/rounded.safetensors" --force \
    --json > /dev/null
  COMMAND="$command" MODEL="$OUT/model.pt" SECONDS_TAKEN=$((SECONDS - begun)) "$PYTHON" - > "$OUT/run.json" <<'END'
import json
import os
import platform

import torch

from lepton import __version__, checkpoint

model = checkpoint.load(os.environ["MODEL"])
settings = "seq_len", "batch_size", "grad_accum", "max_steps", "seed", "lr", "muon_lr", "weight_decay", "cooldown"
print(json.dumps({
    "command": os.environ["COMMAND"],
    "training": {name: model["training"][name] for name in settings},
    "corpus_tokens": model["data"]["train"]["tokens"],
    "tune_flags": os.environ.get("TUNE", ""),
    "eval_flags": os.environ.get("EVAL", "--speculation 128"),
    "seconds": int(os.environ["SECONDS_TAKEN"]),
    "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "lepton": __version__},
}))
END
  lepton eval --checkpoint "$OUT/model.pt" --data_dir "$REPORT" --json > "$OUT/eval-pt.json"
  say "not rounded: $(head -c 300 "$OUT/eval-pt.json")"
}

finish() {
  # What ships is rounded, so that is calibrated: a promise is of these numbers.
  lepton export --checkpoint "$(first rounded)" --out "$OUT/whole.safetensors" --force --json > /dev/null
  of=(--checkpoint "$OUT/whole.safetensors" --data_dir "$DATA" --json)
  lepton calibrate "${of[@]}" > "$OUT/calibrate.json" || say "calibrate: what training fitted stays"
  # A promise that the other half of the text breaks is not kept; the others then stand.
  for risk in 0.05 0.1 0.2 0.3 0.4; do
    lepton calibrate "${of[@]}" --risk $risk >> "$OUT/risks.jsonl" || say "no risk $risk"
  done
  for cost in 0.01 0.02 0.05; do
    lepton calibrate "${of[@]}" --max_cost $cost >> "$OUT/costs.jsonl" || say "no cost $cost"
  done
  say "calibrated"
  lepton export --checkpoint "$OUT/whole.safetensors" --dtype int8 --max_file_mb 15 --out "$OUT/model.safetensors" \
    --force --json > "$OUT/export.json"
  weights=$(first model)
  lepton eval --checkpoint "$weights" --data_dir "$REPORT" ${EVAL:---speculation 128} --json \
    > "$OUT/eval-safetensors.json"
  say "rounded: $(head -c 300 "$OUT/eval-safetensors.json")"
  for text in ${SOURCES:+"$SOURCES"/*.jsonl.xz}; do
    name=$(basename "$text" .jsonl.xz)
    lepton eval --checkpoint "$weights" --text "$text" --json > "$OUT/source-$name.json"
    say "$name: $(head -c 300 "$OUT/source-$name.json")"
  done
}

[ "$STAGE" = finish ] || train "$@"
[ "$STAGE" = train ] || finish
say "done"
