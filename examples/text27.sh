#!/usr/bin/env bash
# The text8 experiment of the SEDD paper at the size of a laptop: compares absorbing noise with uniform noise (geometric and
# log-linear schedules) at one model size and number of steps, by bits per character on held-out text.
#
#   bash examples/text27.sh FOLDER FILE...
#
# FILE: text of a-z and space (text8, or anything converted to its 27 symbols), plain or .gz; several are joined. The first
# 90 % are for training, the next 5 % for validation, the last 5 % for the test. All results are written to FOLDER; a
# second call resumes. Variables: JUDGE, a causal language model (a hub name, a folder or a .gguf file) that computes the
# perplexity of samples (without it, this part is skipped); STEPS=6000 training steps, DRAWS=16 noise levels per block,
# NUM=96 samples, PRESET=tiny, SEDD=sedd (the command).
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
sedd=${SEDD:-sedd}
folder=$1
shift
mkdir -p "$folder"

if [ ! -s "$folder/test.txt" ]; then
  gzip -dcf "$@" > "$folder/all.txt"
  size=$(wc -c < "$folder/all.txt")
  head -c "$((size - size / 10))" "$folder/all.txt" > "$folder/train.txt"
  tail -c "$((size / 10))" "$folder/all.txt" > "$folder/rest.txt"
  head -c "$((size / 20))" "$folder/rest.txt" > "$folder/valid.txt"
  tail -c "$((size / 20))" "$folder/all.txt" > "$folder/test.part"
  rm "$folder/all.txt" "$folder/rest.txt"
  mv "$folder/test.part" "$folder/test.txt" # last: it says that all of them are whole
fi

train() { # name, then options
  local run="$folder/$1"
  shift
  $sedd train --run_dir "$run" $([ -f "$run/config.json" ] && echo --resume) \
    --data.source "$folder/train.txt" --data.valid_source "$folder/valid.txt" --data.windows true --tokenizer text8 \
    --model.preset "${PRESET:-tiny}" --model.length 256 --batch_size 16 --ema 0.999 --steps "${STEPS:-6000}" "$@"
}

evaluate() { # name
  $sedd eval perplexity "$folder/$1" "$folder/test.txt" --draws "${DRAWS:-16}" --json "$folder/$1/eval/perplexity.json"
  if [ -n "${JUDGE:-}" ]; then
    $sedd eval generative "$folder/$1" --text "$folder/test.txt" --judge "$JUDGE" --num "${NUM:-96}" \
      --steps [4,8,16,32,64,128] --json "$folder/$1/eval/generative.json" --plot "$folder/$1/eval/generative.png"
  fi
  $sedd report "$folder/$1"
}

train absorbing
train uniform-geometric --process uniform --schedule geometric --schedule_params.sigma_max 20
train uniform-loglinear --process uniform
for run in absorbing uniform-geometric uniform-loglinear; do evaluate "$run"; done
"$(dirname "$0")/compare.py" "$folder"/{absorbing,uniform-geometric,uniform-loglinear} --out "$folder/comparison" \
  --words "$folder/train.txt"
