#!/usr/bin/env bash
# Transformer -> activations -> SAEs -> scores at tiny sizes, each through its own script, and the figures checked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A smaller modulus learns in a quarter of the time. The chaos tests train the default transformer.
subject=$(python scripts/training/train_modular_addition.py --artifact-root "$work" --modulus 59 --batch-size 256 |
  awk '/^subject/ {print $2}')
store=$(python scripts/analysis/extract_activations.py --artifact-root "$work" --model-name "$subject" | awk '/^store/ {print $2}')
python scripts/experiments/train_husai_sae_on_cached_activations.py --artifact-root "$work" --output-dir "$work/saes" \
  --activation-cache-dir "$store" --seeds 1,2,3 --d-sae 64 --k 4 --batch-size 256 --tokens 60000
python scripts/experiments/run_phase4a_reproduction.py --artifact-root "$work" --output-dir "$work/phase4a" \
  --activation-cache-dir "$store" --seeds 1,2,3 --d-sae 64 --k 4 --batch-size 256 --tokens 60000 --null-draws 10
python scripts/ci/check_smoke.py "$work/saes/results.json" "$work/phase4a/results.json"
