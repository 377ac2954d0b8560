#!/usr/bin/env bash
# The first owner of a GPU runs this, in a checkout: is the engine correct on CUDA, and how fast are step, loader and loop?
#
#   bash infra/acceptance/gpu.sh [--wheels DIR] [--images DIR] [--quick]
#
# Needs Python 3.11 or newer with torch, torchvision, timm and transformers, and no network. --wheels: a folder with wheels of
# whatever else is missing (docs/performance.md says which), installed into a folder that is deleted at the end. --images:
# photographs as JPEGs; generated ones are used without it. --quick: a small model, on a machine without a GPU as well.
#
# Output: a JSON line per measurement, then a table. Messages and the parts' own tables go to standard error.
# Exit code 1 if a part or a check failed. On a GPU machine it ends within 10 minutes: a part that takes too long is cut off.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
wheels='' quick='' images=() limit=565
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=${2:?--wheels needs a folder}; shift 2 ;;
    --images) images=(--images "$(realpath "${2:?--images needs a folder}")"); shift 2 ;;
    --quick) quick=yes limit=1200; shift ;;
    *) sed -n '4p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ -n "$wheels" ]; then
  # --no-deps: with --target, pip ignores what is installed and would ask for wheels of torch as well.
  "$python" -m pip install -q --no-index --no-deps --find-links "$wheels" --target "$work/site" "$wheels"/*.whl >&2 || exit 1
  export PYTHONPATH=$work/site:$PYTHONPATH
fi
: > "$work/lines"

# part NAME SECONDS MODULE [OPTION...]: run a module; JSON lines go to standard output and the table, the rest to standard error.
part() {
  local name=$1 seconds=$2 began=$SECONDS code
  shift 2
  [ "$seconds" -le $((limit - SECONDS)) ] || seconds=$((limit > SECONDS ? limit - SECONDS : 1))
  echo "== $*" >&2
  timeout -k 10 "$seconds" "$python" -m "$@" | while IFS= read -r line; do
    case $line in '{"benchmark"'*) echo "$line" | tee -a "$work/lines" ;; *) echo "$line" >&2 ;; esac
  done
  code=${PIPESTATUS[0]}
  echo "== $((SECONDS - began)) s" >&2
  # A check that fails has printed its own line.
  if [ "$code" -ne 0 ] && ! { [ "$name" = correctness ] && grep -q '"ok": false' "$work/lines"; }; then
    case $code in 124 | 137) code="not done after $seconds s" ;; *) code="exit code $code" ;; esac
    echo "{\"benchmark\": \"$name\", \"command\": \"${*//\"/}\", \"failed\": \"$code\"}" | tee -a "$work/lines"
  fi
}

part correctness 120 infra.acceptance.correctness "${images[@]}"
if [ -n "$quick" ]; then
  part train_step 300 benchmarks.train_step --quick --no-ablations --rounds 1
  part step_variants 300 benchmarks.step_variants --quick
  part loader 300 benchmarks.loader --quick --rounds 1 "${images[@]}"
  part loop 300 infra.acceptance.loop --quick "${images[@]}"
  part usual 300 infra.acceptance.usual --quick "${images[@]}"
else
  sizes=(base:512 large:512 huge:256)
  for size in "${sizes[@]}"; do
    part train_step 60 benchmarks.train_step --model "${size%:*}" --batch "${size#*:}" --no-ablations --no-whole --rounds 2 --steps 5
  done
  part loader 50 benchmarks.loader --quick "${images[@]}"
  for size in "${sizes[@]}"; do
    part loop 60 infra.acceptance.loop --model "${size%:*}" --batch "${size#*:}" "${images[@]}"
  done
  for size in "${sizes[@]}"; do
    part usual 45 infra.acceptance.usual --model "${size%:*}" --batch "${size#*:}" "${images[@]}"
  done
  part step_variants 90 benchmarks.step_variants --model large --batch 256 --budget 50
fi
"$python" -m infra.acceptance.table < "$work/lines"
