#!/usr/bin/env bash
# The text8 experiments of the SEDD and MD4 papers at the size of a laptop: trains the same backbone with every objective, and
# compares the runs by bits per character on held-out text and by their samples.
#
#   bash examples/text27.sh FOLDER FILE...
#
# FILE: text of a-z and space (text8, or anything converted to its 27 symbols), plain or .gz; several are joined. The first
# 90 % are for training, the next 5 % for validation, the last 5 % for the test. All results are written to FOLDER; a
# second call resumes. Variables: RUNS, names of runs (see `options` below for them; NAME-seed1 is NAME with another seed);
# JUDGE, a causal language model (a hub name, a folder, a .gguf file or an autoregressive run such as FOLDER/ar) that
# computes the perplexity of samples (without it, this part is skipped); STEPS=6000 training steps, DRAWS=16 noise levels per
# block, BLOCKS, how many blocks of the test are scored (default: all), NUM=96 samples, PRESET=tiny, SEDD=sedd (the command).
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
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

options() { # name
  local base
  case $1 in
    *-seed*) base=$(options "${1%-seed*}") && echo "$base --seed ${1##*-seed}" ;;
    ar) echo "--objective autoregressive" ;;
    sedd-absorbing) echo "--objective score_entropy" ;;
    sedd-uniform) echo "--objective score_entropy --process uniform" ;;
    sedd-uniform-geometric) echo "--process uniform --schedule geometric --schedule_params.sigma_max 20" ;;
    md4) echo "--objective md4" ;;
    genmd4) echo "--objective genmd4" ;;
    udlm) echo "--objective udlm --process uniform" ;;
    gidd) echo "--objective gidd --process hybrid" ;;
    d3pm-absorbing) echo "--objective d3pm" ;;
    d3pm-uniform) echo "--objective d3pm --process uniform" ;;
    tauldr) echo "--objective tauldr" ;;
    csm) echo "--objective concrete_score" ;;
    *) echo "RUNS: no run has the name $1; the names are in $0" >&2; return 2 ;;
  esac
}

runs=${RUNS:-ar sedd-absorbing sedd-uniform md4 genmd4 udlm gidd d3pm-absorbing d3pm-uniform tauldr csm}
for run in $runs; do options "$run" > "$folder/options"; done # a wrong name is an error before any work

for run in $runs; do
  options "$run" > "$folder/options"
  $sedd train --run_dir "$folder/$run" $([ -f "$folder/$run/config.json" ] && echo --resume) \
    --data.source "$folder/train.txt" --data.valid_source "$folder/valid.txt" --data.windows true --tokenizer text8 \
    --model.preset "${PRESET:-tiny}" --model.length 256 --batch_size 16 --lr_schedule linear --steps "${STEPS:-6000}" \
    $(cat "$folder/options")
done

for run in $runs; do
  $sedd eval perplexity "$folder/$run" "$folder/test.txt" --draws "${DRAWS:-16}" ${BLOCKS:+--blocks "$BLOCKS"} \
    --json "$folder/$run/eval/perplexity.json"
  if [ -n "${JUDGE:-}" ]; then
    case $run in ar*) samplers=autoregressive ;; *) samplers=tweedie ;; esac
    $sedd eval generative "$folder/$run" --text "$folder/test.txt" --judge "$JUDGE" --num "${NUM:-96}" \
      --steps 4,8,16,32,64,128 --samplers "$samplers" --batch_size 32 --json "$folder/$run/eval/generative.json" \
      --plot "$folder/$run/eval/generative.png"
  fi
  $sedd report "$folder/$run"
done
rm "$folder/options"
examples=$(cd "$(dirname "$0")" && pwd)
(cd "$folder" && exec "$examples/compare.py" $runs --out comparison --words train.txt \
  --papers "$examples/text8.json")
