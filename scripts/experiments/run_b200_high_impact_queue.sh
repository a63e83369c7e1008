#!/usr/bin/env bash
# The whole program, stage after stage. Each stage resumes by its cells: run the same command again after an interruption.
#
#   PROFILE=embedded bash scripts/experiments/run_b200_high_impact_queue.sh     2 CPU cores; what `make demo` runs
#   PROFILE=b200     bash scripts/experiments/run_b200_high_impact_queue.sh     one GPU
#
# Variables: PROFILE (embedded), SEEDS (42,123,456,789,1011), OUTPUT (results), SUBJECT (husai-tiny): the language model,
# one that ships, a Hugging Face folder or a hub name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PROFILE=${PROFILE:-embedded}
SEEDS=${SEEDS:-42,123,456,789,1011}
OUTPUT=${OUTPUT:-results}
SUBJECT=${SUBJECT:-husai-tiny}

case "$PROFILE" in
  embedded)
    DEVICE=cpu
    LANGUAGE_MODEL=(--rows 100000 --d-sae 512 --k 16 --tokens 150000)
    ;;
  b200)
    DEVICE=cuda
    LANGUAGE_MODEL=(--rows 5000000 --d-sae 4096 --k 32 --tokens 50000000 --batch-size 4096 --learning-rate 5e-4)
    ;;
  *) echo "error: PROFILE=$PROFILE: embedded or b200 expected" >&2; exit 2 ;;
esac

# ----------------------------------------------------------------------------------------------------------------------
# Phase 4a on modular addition, the positive control: subject -> activations -> SAEs -> stability against nulls

python scripts/experiments/run_phase4a_reproduction.py --seeds "$SEEDS" --device "$DEVICE" \
  --artifact-root "$OUTPUT" --output-dir "$OUTPUT/experiments/phase4a_trained_vs_random"

# ----------------------------------------------------------------------------------------------------------------------
# Phase 4a on a language model, its random-weights control beside the nulls

python scripts/experiments/run_phase4a_reproduction.py --seeds "$SEEDS" --device "$DEVICE" \
  --subject "$SUBJECT" --hook-name blocks.1.hook_resid_pre "${LANGUAGE_MODEL[@]}" \
  --artifact-root "$OUTPUT" --output-dir "$OUTPUT/experiments/phase4a_language_model"
