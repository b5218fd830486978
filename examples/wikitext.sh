#!/usr/bin/env bash
# GPT-2's tokens at the smallest size: trains the same network as an autoregressive model, with score entropy and with MD4
# on one WikiText file, scores another one, and compares the runs by likelihood and by samples.
#
#   bash examples/wikitext.sh FOLDER TRAIN.raw TEST.raw
#
# All results are written to FOLDER; a second call resumes. Variables: RUNS, names of runs (default: ar sedd-absorbing md4);
# JUDGE, a causal language model (a hub name, a folder, a .gguf file or an autoregressive run such as FOLDER/ar) that
# computes the perplexity of samples (without it, this part is skipped); STEPS=2000 training steps, DRAWS=16 noise levels per
# block, BLOCKS, how many blocks of the test are scored (default: all), NUM=32 samples, PRESET=tiny, SEDD=sedd (the command).
set -euo pipefail
if [ $# -ne 3 ]; then sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
sedd=${SEDD:-sedd}
folder=$1

options() { # name
  case $1 in
    ar) echo "--objective autoregressive" ;;
    sedd-absorbing) echo "--objective score_entropy" ;;
    md4) echo "--objective md4" ;;
    *) echo "RUNS: no run has the name $1; expected ar, sedd-absorbing or md4" >&2; return 2 ;;
  esac
}

runs=${RUNS:-ar sedd-absorbing md4}
mkdir -p "$folder"
for run in $runs; do options "$run" > "$folder/options"; done # a wrong name is an error before any work

for run in $runs; do
  options "$run" > "$folder/options"
  $sedd train --run_dir "$folder/$run" $([ -f "$folder/$run/config.json" ] && echo --resume) \
    --data.source "$2" --data.documents paragraph --data.detokenizer wikitext --tokenizer gpt2 \
    --model.preset "${PRESET:-tiny}" --batch_size 16 --valid_every 250 --steps "${STEPS:-2000}" $(cat "$folder/options")
done
rm "$folder/options"

for run in $runs; do
  $sedd eval perplexity "$folder/$run" "$3" --detokenizer wikitext --draws "${DRAWS:-16}" ${BLOCKS:+--blocks "$BLOCKS"} \
    --json "$folder/$run/eval/perplexity.json"
  $sedd sample "$folder/$run" --num 3 --json "$folder/$run/eval/samples.json"
  if [ -n "${JUDGE:-}" ]; then
    $sedd eval generative "$folder/$run" --judge "$JUDGE" --num "${NUM:-32}" --json "$folder/$run/eval/generative.json" \
      --plot "$folder/$run/eval/generative.png"
  fi
  $sedd report "$folder/$run"
done
examples=$(cd "$(dirname "$0")" && pwd)
(cd "$folder" && exec "$examples/compare.py" $runs --out comparison)
