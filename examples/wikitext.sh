#!/usr/bin/env bash
# GPT-2 tokens at the smallest size: trains on one WikiText file, scores another one, samples, and evaluates the samples.
#
#   bash examples/wikitext.sh FOLDER TRAIN.raw TEST.raw
#
# All results are written to FOLDER; a second call resumes. Variables: JUDGE, a causal language model (a hub name, a folder
# or a .gguf file) that computes the perplexity of samples (without it, this part is skipped); MINUTES=15 of training,
# DRAWS=16 noise levels per block, NUM=32 samples, SEDD=sedd (the command).
set -euo pipefail
if [ $# -ne 3 ]; then sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
sedd=${SEDD:-sedd}
run=$1/run

$sedd train --run_dir "$run" $([ -f "$run/config.json" ] && echo --resume) \
  --data.source "$2" --data.documents paragraph --data.detokenizer wikitext --tokenizer gpt2 \
  --batch_size 16 --valid_every 250 --max_minutes "${MINUTES:-15}"
$sedd eval perplexity "$run" "$3" --detokenizer wikitext --draws "${DRAWS:-16}" --json "$run/eval/perplexity.json"
$sedd sample "$run" --num 3 --json "$run/eval/samples.json"
if [ -n "${JUDGE:-}" ]; then
  $sedd eval generative "$run" --judge "$JUDGE" --num "${NUM:-32}" --json "$run/eval/generative.json" \
    --plot "$run/eval/generative.png"
fi
$sedd report "$run"
