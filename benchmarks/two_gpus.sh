#!/usr/bin/env bash
# Questions about TINY that one call on a host with two GPUs can answer: models are trained side by side and one after
# the other, and compile while another one trains. Each line says what was found as soon as it is known.
#   DATA=folder of shard_*.npy with val/   TOKENIZER=the file that it was made with   OUT=folder (default: two-gpus-out)
#   bash benchmarks/two_gpus.sh drafts       two drafters, before and after they learn from the models' own text
#   bash benchmarks/two_gpus.sh drafters     drafters that learn from every token, that are wider, or do not distil
#   bash benchmarks/two_gpus.sh windows      narrower windows beside wide blocks; four models, about 6 minutes
#   bash benchmarks/two_gpus.sh seeds        complete and dense, three seeds each, about 7 minutes
#   bash benchmarks/two_gpus.sh generate     speed of one text with the models that `drafts` leaves, 3 minutes
#   bash benchmarks/two_gpus.sh generate_many  of 64 to 1,024 texts with $OUT/tiny.pt, which `drafts` and `seeds` leave
#   bash benchmarks/two_gpus.sh depth        routing at MICRO: four weights of the exit's gradient into the stem
#   bash benchmarks/two_gpus.sh routes       routing at TINY: an exit that leaves the stem alone, and the sizes' options
#   bash benchmarks/two_gpus.sh all_on       text and all tasks in one model, beside dense ones; BABI=folder of bAbI
#   bash benchmarks/two_gpus.sh tasks        hops, chains, recall of two steps, needles, path-star, 9 minutes
set -u
OUT=${OUT:-two-gpus-out}
PYTHON=${PYTHON:-python3}
TOKENS=${TOKENS:-49e6}
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1
mkdir -p "$OUT"
begun=$SECONDS
data=(--data_dir "$DATA" --tokenizer "$TOKENIZER")

# train GPU NAME OPTIONS...: one model; what it found goes to NAME.txt, the gist to the terminal.
train() {
  local gpu=$1 name=$2 file="$OUT/$2.txt"
  shift 2
  CUDA_VISIBLE_DEVICES=$gpu timeout 560 "$PYTHON" -m benchmarks.ideas "${data[@]}" --size tiny --tokens "$TOKENS" \
    --lock "$OUT/gpu$gpu.lock" "$@" > "$file" 2>&1
  local keys='"(val_loss|tokens_per_s|prepare_s|tune_s|warm_up_s|tokens_per_step)": [0-9.]+'
  echo "[$((SECONDS - begun)) s] $name: $(grep -oE "$keys" "$file" |
    awk '!seen[$0]++' | tr '\n' ' ')"
  grep -E "Error" "$file" | tail -n 1
}

# generate GPU MODEL NAME CASES OPTIONS...: the speed of $OUT/MODEL.pt.
generate() {
  local gpu=$1 model=$2 file="$OUT/generate-$2-$3"
  shift 3
  CUDA_VISIBLE_DEVICES=$gpu timeout 280 "$PYTHON" -m benchmarks.generate_speed "${data[@]}" \
    --checkpoint "$OUT/$model.pt" --json "$file.json" --cases "$@" > "$file.txt" 2>&1
  grep -hE "^(case|tiny/[^ ]+) " "$file.txt"
}

# prove GPU NAME SECONDS TASK OPTIONS...: a task of the proving ground at the usual rate, so long for each contender.
prove() {
  local gpu=$1 file="$OUT/$2.txt" seconds=$3
  shift 3
  CUDA_VISIBLE_DEVICES=$gpu timeout 570 "$PYTHON" -m benchmarks.proving_ground."$@" --rates 1 \
    --seconds "$seconds" > "$file" 2>&1
  echo "[$((SECONDS - begun)) s] $*"
  grep -vE "^\{|step|: \{" "$file" | tail -n 12
}

# all_on GPU VARIANT: one model that learns text and tasks; all that it says goes to all_on_VARIANT.txt.
all_on() {
  local gpu=$1 variant=$2 file="$OUT/all_on_$2.txt" left=$((590 - SECONDS + begun))
  CUDA_VISIBLE_DEVICES=$gpu timeout "$left" "$PYTHON" -m benchmarks.proving_ground.all_on "${data[@]}" --size tiny \
    --tokens "$TOKENS" --babi_dir "${BABI:-}" --variant "$variant" --lock "$OUT/gpu$gpu.lock" \
    --save "$OUT/all_on_$variant.pt" --deadline $((left - 60)) > "$file" 2>&1
  echo "[$((SECONDS - begun)) s] $variant: $(grep -oE '"(tokens_per_s|val_loss)": [0-9.]+' "$file" |
    awk '!seen[$0]++' | tr '\n' ' ')"
  grep -vE "^\{|step" "$file" | tail -n 12
}

for part in "$@"; do
  case $part in
    drafts)
      tuned=(--drafts --tune 8192 --tune_steps 1000 --tune_share 0.3 --change drafter.distil=true)
      small=(drafter.reads_stem=false drafter.vocab=4096 drafter.width=256)
      train 0 tuned "${tuned[@]}" "${small[@]}" --save "$OUT/tiny.pt" &
      train 1 tuned_large "${tuned[@]}" drafter.reads_stem=true drafter.vocab=8192 drafter.width=256 --save "$OUT/large.pt" &
      wait ;;
    drafters)
      large=(drafter.distil=true drafter.reads_stem=true drafter.vocab=8192 drafter.width=256)
      train 0 stride_1 --drafts --change "${large[@]}" drafter.stride=1 &
      train 1 width_512 --drafts --change "${large[@]}" drafter.width=512 &
      sleep 90
      train 0 both --drafts --change "${large[@]}" drafter.stride=1 drafter.width=512 &
      train 1 no_distil --drafts --change "${large[@]}" drafter.distil=false &
      wait ;;
    windows)
      train 0 window_256 --brief &
      train 1 window_128 --brief --change window=128 wide_window=512 &
      sleep 90
      train 0 window_128_wide_1024 --brief --change window=128 wide_window=1024 &
      train 1 window_64 --brief --change window=64 wide_window=512 &
      wait ;;
    seeds)
      for seed in 0 1 2; do
        train 0 "complete_$seed" --brief --seed $seed --save "$OUT/tiny.pt" &
        train 1 "dense_$seed" --brief --seed $seed --variant dense &
        [ $seed = 2 ] || sleep 90
      done
      wait ;;
    generate)
      generate 0 tiny one 1x512/plain 1x512/drafts 1x512/auto --rounds 48 --new_tokens 64 --profile 25 &
      generate 1 large one 1x512/plain 1x512/drafts 1x512/auto --rounds 48 --new_tokens 64 --profile 25 &
      wait ;;
    generate_many)
      generate 0 tiny 64 64x512/plain/0 64x512/drafts/0 64x8192/plain/0 --rounds 5 --new_tokens 128 --seconds 240 &
      generate 1 tiny 1024 256x512/plain/0 1024x512/plain/0 --rounds 5 --new_tokens 128 --seconds 240 &
      wait ;;
    depth)
      for weight in 0 0.03 0.1 0.3; do
        gpu=$([ "$weight" = 0 ] || [ "$weight" = 0.1 ] && echo 0 || echo 1)
        (CUDA_VISIBLE_DEVICES=$gpu timeout 280 "$PYTHON" -m benchmarks.proving_ground.depth "${data[@]}" --size micro \
          --tokens 24.5e6 --dense_layers --change router.exit_stride=8 router.distil=true router.expected=true \
          router.reads_exit=true router.into_stem=$weight > "$OUT/depth_$weight.txt" 2>&1
        echo "[$((SECONDS - begun)) s] into_stem=$weight"; grep -v "^{" "$OUT/depth_$weight.txt" | tail -n 14) &
      done
      wait ;;
    routes)
      for seed in 0 1; do
        for weight in 0 0.3; do
          gpu=$([ "$weight" = 0 ] && echo 0 || echo 1)
          learned=(router.exit_stride=8 router.distil=true router.expected=true router.reads_exit=true)
          [ "$weight" = 0 ] && learned=(router.exit_stride=32 router.distil=false router.expected=false \
            router.reads_exit=false)
          (CUDA_VISIBLE_DEVICES=$gpu timeout 560 "$PYTHON" -m benchmarks.proving_ground.depth "${data[@]}" --size tiny \
            --tokens "$TOKENS" --seed $seed --dense_layers --lock "$OUT/gpu$gpu.lock" \
            --change "${learned[@]}" router.into_stem="$weight" > "$OUT/routes_${weight}_$seed.txt" 2>&1
          echo "[$((SECONDS - begun)) s] into_stem=$weight, seed $seed"
          grep -E '"tokens_per_s"' "$OUT/routes_${weight}_$seed.txt" | grep -oE '"tokens_per_s": [0-9]+' | head -n 1
          grep -vE "^\{|step" "$OUT/routes_${weight}_$seed.txt" | tail -n 12) &
        done
      done
      wait ;;
    all_on)
      all_on 0 complete &
      all_on 1 dense &
      sleep 60
      all_on 1 dense_flops &
      wait ;;
    tasks)
      (prove 0 two_steps 240 recall --two_step --models dense memory) &
      (prove 0 hops_without 120 hops --models no_thoughts pauses; prove 0 path_star 200 path_star --models complete) &
      (prove 1 chains 120 chains --models no_thoughts thoughts; prove 1 window_only 100 recall --models window_only) &
      (prove 1 needle 440 needle --filler_dir "$DATA" --tokenizer "$TOKENIZER" --models memory) &
      wait ;;
    *) echo "unknown part $part: see the head of this file" >&2; exit 2 ;;
  esac
done
