#!/usr/bin/env bash
# gpt2-small-res-jb end to end, on a machine with a network: SAELens' catalogue -> the hub -> GPT-2 -> benchmark.
# It downloads about 0.9 GB (GPT-2 and one SAE) and takes minutes. --dry-run prints the commands.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
run() { "$@"; }
if [ "${1:-}" = --dry-run ]; then run() { echo "$*"; }; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset HF_HUB_OFFLINE

sae="sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pre"
run python scripts/analysis/list_saes.py --open "$sae"

# Held-out figures stand beside what the catalogue states of this SAE.
run python scripts/experiments/run_husai_saebench_custom_eval.py --checkpoint "$sae" --model-name gpt2 \
  --hook-name blocks.8.hook_resid_pre --dataset-names 36_sciq_tf --rows 20000 --noise-seeds 43 \
  --artifact-root "$work" --output-dir "$work/saebench"
run python scripts/ci/check_networked.py "$work/saebench/results.json" "$sae"

# The second time the cache holds all files, and nothing is asked of the network.
export HF_HUB_OFFLINE=1
run python scripts/analysis/list_saes.py --open "$sae"
echo "networked check: commit docs/opened_saes.json and write docs/sources.md again"
