#!/usr/bin/env bash
# Everything that is measured on a host with two GPUs, in at most 16 minutes: `benchmarks.scaling` for four sizes, equal
# losses of one and two processes in fp32, and a killed rank that starts again. Each part has its own time limit; one
# that fails does not stop the others. Run it in the root of a checkout.
#   DATA=folder of shard_*.npy (without it, random tokens, and the default data in parts 1 and 6)
#   TOKENIZER=file of the tokenizer that DATA was made with (default: the one of the package)
#   OUT=folder for results (default: ./scaling-out)
#   bash benchmarks/scaling.sh            all parts
#   bash benchmarks/scaling.sh 1 2 5      only these
set -u
OUT=${OUT:-scaling-out}
DATA=${DATA:-}
PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS=8
# NVLink multicast stays off.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
mkdir -p "$OUT"
data=()
[ -n "$DATA" ] && data=(--data_dir "$DATA")
[ -n "${TOKENIZER:-}" ] && data+=(--tokenizer "$TOKENIZER")
parts=" ${*:-1 2 3 4 5 6} "
wanted() { [[ "$parts" == *" $1 "* ]]; }

# 1: 1 against 2 processes, 50 steps in fp32: losses within 1e-4 (NANO, not compiled). At most 100 s.
if wanted 1; then
  flags=(--model_size nano "${data[@]}" --dtype fp32 --no_compile --max_steps 50 --batch_size 8 --grad_accum 2
    --seq_len 256 --log_every 10 --eval_every 1000 --eval_batches 1 --sample_tokens 4 --save_every 1000)
  for n in 1 2; do
    timeout 50 "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node $n train.py "${flags[@]}" \
      --checkpoint_dir "$OUT/fp32-$n" > "$OUT/fp32-$n.txt" 2>&1
    tail -n 2 "$OUT/fp32-$n.txt"
  done
  "$PYTHON" - "$OUT" <<'PY'
import json, sys
losses = [[e["loss"] for e in map(json.loads, open(f"{sys.argv[1]}/fp32-{n}/metrics.jsonl")) if "loss" in e] for n in (1, 2)]
worst = max(abs(a - b) for a, b in zip(*losses, strict=True))
print(f"CHECK 1 (50 steps, fp32, 1 against 2): worst difference of a loss {worst:.2e}, bar 1e-4:", worst <= 1e-4)
PY
fi

# 2: TINY, 64 x 512 a GPU, 1 and 4 micro-batches a GPU. Bars 1.85x and 1.95x. At most 150 s.
wanted 2 && timeout 150 "$PYTHON" -m benchmarks.scaling --cases tiny/64x512 --steps 6 --deadline 140 \
  --json "$OUT/tiny.json" 2> "$OUT/tiny.err"

# 3: MEDIUM, rows of 1024. Bar 1.93x. At most 210 s.
wanted 3 && timeout 210 "$PYTHON" -m benchmarks.scaling --cases medium/16x1024 --micro 1 --steps 4 --deadline 200 \
  --json "$OUT/medium.json" 2> "$OUT/medium.err"

# 4: XL, sharded. Bars: trains, 10 % of the forecast, 40 % MFU. At most 230 s.
wanted 4 && timeout 230 "$PYTHON" -m benchmarks.scaling --cases xl/16x1024/shard --processes 2 --micro 1 8 --steps 3 \
  --deadline 220 --json "$OUT/xl.json" 2> "$OUT/xl.err"

# 5: XXL, sharded and recomputed. Bar: trains. At most 160 s.
wanted 5 && timeout 160 "$PYTHON" -m benchmarks.scaling --cases xxl/16x1024/shard/recompute --processes 2 --micro 1 \
  --steps 2 --deadline 150 --json "$OUT/xxl.json" 2> "$OUT/xxl.err"

# 6: kill -9 of rank 1 on GPUs, with --max_restarts 1: no hang, goes on from the last checkpoint. At most 100 s.
if wanted 6; then
  timeout 100 "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node 2 --max_restarts 1 train.py \
    --model_size nano "${data[@]}" --no_compile --max_steps 3000 --batch_size 8 --grad_accum 2 --save_every 50 \
    --eval_every 10000 --eval_batches 1 --sample_tokens 4 --log_every 50 --checkpoint_dir "$OUT/killed" \
    > "$OUT/killed.txt" 2>&1 &
  launcher=$!
  for _ in $(seq 120); do sleep 0.5; grep -q "step 100/" "$OUT/killed.txt" && break; done
  victim=$(pgrep -P $launcher -f torch.distributed.run | head -n 1)
  victim=$(pgrep -P "${victim:-$launcher}" -f train.py | tail -n 1)
  [ -n "$victim" ] && kill -9 "$victim"
  wait $launcher
  echo "CHECK 6 (kill -9 of a rank): exit code $?"
  grep -E "resuming|gone|error|checkpoint:" "$OUT/killed.txt"
fi
grep -hE "cannot|Error" "$OUT"/*.err "$OUT"/*.txt 2>/dev/null | sort | uniq -c | head -n 20
