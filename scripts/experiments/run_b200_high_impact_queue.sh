#!/usr/bin/env bash
# The whole program, stage after stage. Each stage resumes by its cells: run the same command again after an interruption.
#
#   PROFILE=embedded bash scripts/experiments/run_b200_high_impact_queue.sh     2 CPU cores; what `make demo` runs
#   PROFILE=b200     bash scripts/experiments/run_b200_high_impact_queue.sh     one GPU
#
# Variables: PROFILE (embedded), SEEDS (42,123,456,789,1011), OUTPUT (results).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PROFILE=${PROFILE:-embedded}
SEEDS=${SEEDS:-42,123,456,789,1011}
OUTPUT=${OUTPUT:-results}

case "$PROFILE" in
  embedded) DEVICE=cpu ;;
  b200) DEVICE=cuda ;;
  *) echo "error: PROFILE=$PROFILE: embedded or b200 expected" >&2; exit 2 ;;
esac

# ----------------------------------------------------------------------------------------------------------------------
# Phase 4a: subject -> activations -> SAEs -> stability against nulls

python scripts/experiments/run_phase4a_reproduction.py --seeds "$SEEDS" --device "$DEVICE" \
  --artifact-root "$OUTPUT" --output-dir "$OUTPUT/experiments/phase4a_trained_vs_random"
