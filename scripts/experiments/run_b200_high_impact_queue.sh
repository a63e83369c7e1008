#!/usr/bin/env bash
# The whole program, stage after stage, from the environment to the report card. Run the same command again after an
# interruption: what is finished is read. A stage that fails does not stop the others, and is named at the end. The exit
# code is the gate's (0 passed, 1 not), or 2 where a stage failed. Paths are relative to the repository.
#
#   PROFILE=embedded bash scripts/experiments/run_b200_high_impact_queue.sh     2 CPU cores; what `make demo` runs
#   PROFILE=b200     bash scripts/experiments/run_b200_high_impact_queue.sh     one GPU
#   PROFILE=smoke    bash scripts/experiments/run_b200_high_impact_queue.sh     two minutes; its figures mean nothing
#   … --dry-run        print every command, run none
#   … --from STAGE     begin there;   … --only STAGE   run that alone;   … --help   this
#
# Variables, with their defaults:
PROFILE=${PROFILE:-embedded}                         # embedded, b200 or smoke: sizes and device
OUTPUT=${OUTPUT:-results}                            # all that is made lies below it
SUBJECT=${SUBJECT:-}                                 # the language model: one that ships, a folder, or a hub name
                                                     #   (default: husai-tiny; b200: pythia-70m-deduped)
TEXT=${TEXT:-}                                       # its text: packaged, a file or folder, or a hub name, each with
                                                     #   ?column=C&split=S where these are not text and train
                                                     #   (default: packaged; b200: monology/pile-uncopyrighted)
HOOK=${HOOK:-blocks.1.hook_resid_pre}                # where its activations are read
SEEDS=${SEEDS:-42,123,456,789,1011}                  # of the studies; the confirmation takes seeds of its own
EXECUTOR=${EXECUTOR:-local}                          # or ray: the scaling study's layers side by side
MIN_SAEBENCH_DELTA=${MIN_SAEBENCH_DELTA:-0.0}        # what the gate asks beyond the matched reference
MIN_CEBENCH_DELTA=${MIN_CEBENCH_DELTA:-0.0}
CEBENCH_BASELINE_MAP=${CEBENCH_BASELINE_MAP:-}       # hook -> summary of matched references (runbook, benchmarks)
CEBENCH_REPO=${CEBENCH_REPO:-}                       # your checkout of CE-Bench, whose own code then runs as well
CEBENCH_STORIES=${CEBENCH_STORIES:-}                 # GulkoA/contrastive-stories-v3; else its gate stays without evidence
HUSAI_SERVER=${HUSAI_SERVER:-}                       # socket of a warm.py that runs already (default: one of its own)
SAEBENCH_DATASETS=${SAEBENCH_DATASETS:-}             # probing data sets of the studies (default: the profile's)
set -Eeuo pipefail
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait sleep: a fifth less CPU time at the same speed
trap 'exit 2' ERR # what the queue itself trips over is no verdict
{ # bash reads all of it before it runs any: what is changed in this file does not reach a queue that is under way
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
SELF=scripts/experiments/${BASH_SOURCE[0]##*/}
refuse() { echo "error: $1" >&2; exit 2; }

# shellcheck disable=SC2054  # the commas belong to the values
case "$PROFILE" in
  embedded)
    DEVICE=cpu NEED_MB=3000
    # Of six families, each with few tokens: selection reads three, its minimum, and the gate needs the three it leaves.
    DATASETS=5_hist_fig_ismale,41_truthqa_tf,87_glue_cola,95_toxic_is,96_spam_is,105_click_bait
    THREE=$(cut -d, -f1-3 <<< "$SEEDS")
    POSITIVE=(--tokens 200000 --learning-rate 6e-3)
    CONTROL=(--rows 60000 --d-sae 256 --k 16 --tokens 30000 --null-draws 20 --core-texts 10)
    ABLATIONS=(--seeds "$THREE" --tokens 30000 --ks 8,16 --d-saes 128,256 --null-draws 10)
    ADAPTIVE=(--seeds "$THREE" --tokens 40000 --k-candidates 16,32 --null-draws 10)
    ASSIGNMENT=(--tokens 30000 --lambdas 0,0.1 --shared-references 2 --null-draws 10)
    PROBING=(--probing sae_probes_exact --probe-ks 5)
    STUDY=(--rows 60000 --null-draws 100 --heldout-rows 20000 --max-rows 96 --seeds "$THREE" --core-texts 10 "${PROBING[@]}")
    STUDY+=(--learning-rate 1e-2) # 60,000 tokens then explain as much as 100,000 at 3e-3
    # Each architecture is the other's matched reference: nothing is trained for the comparison alone.
    FRONTIER=(--architectures topk,relu --d-sae 256 --ks 16 --tokens 60000)
    SCALING=(--token-budgets 60000 --hook-layers 1 --d-sae-values 128 --k 8)
    STRESS=(--rows 20000) SHIFTED=("${PROBING[@]}")
    BENCHMARKS=()
    ;;
  b200)
    DEVICE=cuda NEED_MB=60000
    DATASETS=probe
    POSITIVE=()
    CONTROL=(--rows 5000000 --d-sae 4096 --k 32 --tokens 50000000 --batch-size 4096 --learning-rate 5e-4)
    ABLATIONS=() ADAPTIVE=() ASSIGNMENT=()
    STUDY=(--rows 5000000 --batch-size 4096 --learning-rate 5e-4 --heldout-rows 500000 --seeds "$SEEDS" --probing sae_probes)
    FRONTIER=(--architectures topk,relu,batchtopk,jumprelu,gated,matryoshka --d-sae 4096 --ks 16,32,64 --tokens 50000000)
    SCALING=(--token-budgets 5000000,15000000,50000000,150000000 --hook-layers 1,2,3 --d-sae-values 2048,4096,8192 --k 32)
    STRESS=(--rows 500000) SHIFTED=(--probing sae_probes)
    BENCHMARKS=(--execute)
    ;;
  smoke)
    DEVICE=cpu NEED_MB=300
    DATASETS=157_amazon_5star,105_click_bait,92_glue_sst2,96_spam_is
    THREE=$(cut -d, -f1-3 <<< "$SEEDS")
    POSITIVE=(--seeds "$THREE" --d-sae 32 --k 4 --tokens 20000 --null-draws 5)
    CONTROL=(--seeds "$THREE" --rows 3000 --d-sae 32 --k 4 --tokens 6000 --batch-size 128 --null-draws 5 --core-texts 10)
    ABLATIONS=(--seeds "$THREE" --tokens 10000 --ks 4 --d-saes 32,48 --null-draws 5)
    ADAPTIVE=(--seeds "$THREE" --confirmation-seeds 2024,2025,2026 --tokens 10000 --k-candidates 4,8 --null-draws 5)
    ASSIGNMENT=(--seeds "$THREE" --tokens 10000 --lambdas 0,0.1 --shared-references 2 --null-draws 5)
    ASSIGNMENT+=(--reference-seeds 7,11,13 --confirmation-seeds 2024,2025,2026 --confirmation-reference-seeds 3024,3025,3026)
    PROBING=(--probing sae_probes_exact --probe-ks 5)
    STUDY=(--rows 3000 --null-draws 100 --heldout-rows 1000 --max-rows 8 --seeds "$THREE" --core-texts 10 "${PROBING[@]}")
    FRONTIER=(--architectures topk --d-sae 32 --ks 8 --tokens 80000 --learning-rate 6e-3)
    SCALING=(--token-budgets 3000 --batch-size 128 --hook-layers 1 --d-sae-values 24 --k 8 --dataset-names 96_spam_is)
    STRESS=(--rows 3000) SHIFTED=(--shifted 87_glue_cola_OOD "${PROBING[@]}")
    BENCHMARKS=()
    ;;
  *) refuse "PROFILE=$PROFILE: embedded, b200 or smoke expected" ;;
esac
[[ $SEEDS =~ ^[0-9]+(,[0-9]+){2,}$ && -z $(tr , '\n' <<< "$SEEDS" | sed 's/^0*//' | sort | uniq -d) ]] ||
  refuse "SEEDS=$SEEDS: three different whole numbers or more expected, as 1,2,3"
[[ $EXECUTOR =~ ^(local|ray)$ ]] || refuse "EXECUTOR=$EXECUTOR: local or ray expected"
for name in MIN_SAEBENCH_DELTA MIN_CEBENCH_DELTA; do
  [[ ${!name} =~ ^-?[0-9]*\.?[0-9]+(e-?[0-9]+)?$ ]] || refuse "$name=${!name}: a number expected"
done
for name in CEBENCH_BASELINE_MAP CEBENCH_REPO CEBENCH_STORIES; do
  [[ -z ${!name} || -e ${!name} || $name=${!name} == CEBENCH_STORIES=GulkoA/contrastive-stories-v* ]] ||
    refuse "$name=${!name}: there is no such file or folder"
done
[[ ! $OUTPUT$SUBJECT$HOOK$TEXT =~ [[:cntrl:]] ]] ||
  refuse "OUTPUT, SUBJECT, HOOK or TEXT: a name of printable characters expected"
OUTPUT=${OUTPUT%/}
if [[ $PROFILE == b200 ]]; then
  SUBJECT=${SUBJECT:-pythia-70m-deduped} TEXT=${TEXT:-monology/pile-uncopyrighted}
fi
SUBJECT=${SUBJECT:-husai-tiny}
SOURCE=() # the confirmation takes the text of the selection, and the stress tests that of the confirmation
[[ -z $TEXT || $TEXT == packaged ]] || SOURCE=(--text "$TEXT")
DATASETS=${SAEBENCH_DATASETS:-$DATASETS}
MAP=() REPO=() STORIES=() ASKED=()
[[ -n $SAEBENCH_DATASETS ]] && ASKED=(--dataset-names "$SAEBENCH_DATASETS")
[[ -n $CEBENCH_BASELINE_MAP ]] && MAP=(--cebench-matched-baseline-map "$CEBENCH_BASELINE_MAP")
[[ -n $CEBENCH_REPO ]] && REPO=(--cebench-repo "$CEBENCH_REPO")
[[ -n $CEBENCH_STORIES ]] && STORIES=(--stories "$CEBENCH_STORIES")

STAGES="environment subject harvest phase4a phase4a_lm ablations adaptive_l0 assignment benchmarks frontier scaling \
selection confirmation random_model transcoder ood gate features audit report"
DRY='' FROM='' ONLY=''
while (($#)); do
  case "$1" in
    --dry-run) DRY=yes ;;
    --from | --only)
      [[ ${2:-} =~ ^[a-z0-9_]+$ && " $STAGES " == *" $2 "* ]] || refuse "$1 ${2:-}: one of $STAGES expected"
      [[ -z $FROM$ONLY ]] || refuse "$1 $2: one of --from and --only expected, once"
      if [[ $1 == --from ]]; then FROM=$2; else ONLY=$2; fi
      shift
      ;;
    -h | --help) sed -n '2,/^set/ { /^set/d; s/^# \?//; p }' "$SELF"; exit ;;
    *) refuse "$1: --dry-run, --from STAGE or --only STAGE expected" ;;
  esac
  shift
done

E=$OUTPUT/experiments QUEUE=$OUTPUT/queue
FAILED=() UNMET=() GATE=''
if [[ -z $DRY ]]; then
  python -c 'import husai' 2> /dev/null ||
    refuse "python does not find the package: make setup, then source .venv/bin/activate (or make queue)"
  mkdir -p "$QUEUE" "$E" 2> /dev/null || refuse "OUTPUT=$OUTPUT: no folder can be made there"
  { : >> "$QUEUE/.lock"; } 2> /dev/null || refuse "OUTPUT=$OUTPUT: cannot be written"
  exec 9> "$QUEUE/.lock"
  flock -n 9 || refuse "OUTPUT=$OUTPUT: another queue works there"
fi
if [[ -z $DRY$FROM$ONLY ]]; then # what an earlier run has left there is space as well
  free=$((($(df -Pk "$OUTPUT" | awk 'NR == 2 {print $4}') + $(du -skD "$OUTPUT" | cut -f 1)) / 1024))
  ((free >= NEED_MB)) || refuse "OUTPUT=$OUTPUT: $free MB free, $NEED_MB expected"
fi

# One process imports the libraries for all stages; each is a child of it, with its own process, log and return code. Not
# on a GPU: CUDA does not survive a fork.
[[ $DEVICE == cpu ]] || HUSAI_SERVER=''
if [[ -z $DRY$ONLY$HUSAI_SERVER && $DEVICE == cpu ]]; then
  HUSAI_SERVER=$QUEUE/.server
  python scripts/experiments/warm.py serve "$HUSAI_SERVER" $$ > "$HUSAI_SERVER.log" 2>&1 < /dev/null &
  OWN=$!
  trap 'kill "$OWN" 2> /dev/null || true; wait "$OWN" 2> /dev/null || true' EXIT
fi
WARM=(python) # until the environment is checked, while the server imports

ALWAYS=(gate report) # quick, and what everybody looks at: made again each time, whatever the manifest says
NOTES=scripts/experiments/queue_manifest.py
manifest() { "${WARM[@]}" "$NOTES" "$1" "$QUEUE/manifest.json" "${@:2}"; }

# Stages that stand: nothing that they follow from has changed, and nothing that they left. One process looks at all, and
# says what does not; of part of the stages each is run, and what the others left is read as it is.
declare -A STANDING
if [[ -z $DRY ]]; then
  while read -r name code; do
    [[ -n $FROM$ONLY ]] || STANDING[$name]=$code
  done < <(export LC_ALL=C.UTF-8 && bash "$SELF" --dry-run | python "$NOTES" finished "$QUEUE/manifest.json" --always "${ALWAYS[@]}")
fi

# stage NAME PLACE COMMAND…: PLACE is the folder or file of its results (- for none). Where it fails, what says its outcome
# is set aside until it succeeds, so that neither a later stage nor a reader takes that of an earlier run for its own.
stage() {
  local name=$1 place=$2 code=0 noted=0 began=$SECONDS before=''
  shift 2
  [[ -n $ONLY && $ONLY != "$name" ]] && return
  if [[ -n $FROM ]]; then
    [[ $FROM == "$name" ]] || return 0
    FROM=''
  fi
  if [[ -n ${STANDING[$name]:-} ]]; then
    code=${STANDING[$name]}
    printf '== %s stands\n' "$name"
    if ((code == 1)); then UNMET+=("$name"); fi
    return
  fi
  printf '\n== %s\n%s\n' "$name" "${*@Q}"
  [[ -n $DRY ]] && return
  if [[ $place != - && " ${ALWAYS[*]} " != *" $name "* ]]; then # the others run always
    before=$(manifest inputs "$place" -- "$@") || noted=$?
    unless_interrupted "$name" "$noted"
  fi
  touch "$QUEUE/.began"
  perform "$@" || code=$?
  if ! interrupted "$code"; then settle "$name" "$place" "$code"; fi
  manifest record "$place" "$PROFILE" "$name" "$code" $((SECONDS - began)) "$before" -- "$@" || noted=$?
  unless_interrupted "$name" "$code"
  unless_interrupted "$name" "$noted"
  ((noted == 0)) || FAILED+=("record of $name")
  [[ $name != gate ]] || GATE=${GATE:-$code}
}

# Ctrl-C reaches the stage by itself; what is sent to the queue alone is passed on. Either way the stage ends in order.
CHILD='' STOPPED=''
trap 'STOPPED=yes' INT
trap 'STOPPED=yes; [[ -z $CHILD ]] || kill -TERM "$CHILD" 2> /dev/null || true' TERM HUP

perform() { # COMMAND…
  local code=0
  if [[ $1 == python ]]; then set -- "${WARM[@]}" "${@:2}"; fi
  (trap - INT && exec "$@") & # in the background, where a signal is seen at once; which ignores Ctrl-C if it isn't told
  CHILD=$!
  wait "$CHILD" || code=$?
  while kill -0 "$CHILD" 2> /dev/null; do wait "$CHILD" || code=$?; done
  CHILD=''
  return "$code"
}

interrupted() { [[ -n $STOPPED ]] || (($1 == 130 || $1 == 143)); }

unless_interrupted() { # NAME CODE
  interrupted "$2" || return 0
  echo "interrupted in $1: the same command resumes" >&2
  exit 130
}

settle() { # NAME PLACE CODE: 1 with new results is a finding: a check does not hold. 0 without any, and all else, is a failure
  local file results=$2/results.json
  if (($3 == 1)) && [[ $2 == - || $results -nt $QUEUE/.began ]]; then
    [[ $1 == gate ]] || UNMET+=("$1")
  elif (($3 != 0)) || [[ $2 == "$E"/* && ! -f $results ]]; then
    FAILED+=("$1 (exit $3)")
    [[ $1 != gate ]] || GATE=2 # whatever its exit code was: it left no decision
    for file in "$2"/{results.json,summary.md,release_policy.json,release_policy.md} "$2"; do
      if [[ -f $file ]]; then mv "$file" "$file.stale"; fi
    done
    return
  fi
  rm -f -- "$2.stale" "$2"/*.stale
}

run() { # NAME FOLDER SCRIPT ARGUMENTS…: a phase, with what all phases take
  local name=$1 folder=$2 script=$3
  shift 3
  stage "$name" "$E/$folder" python "scripts/$script" "$@" --device "$DEVICE" --artifact-root "$OUTPUT" \
    --output-dir "$E/$folder"
}

# ----------------------------------------------------------------------------------------------------------------------
# Environment, the subject of the positive control, activations of the language model

stage environment - python scripts/ci/check_environment.py --device "$DEVICE" --executor "$EXECUTOR" "${ASKED[@]}"
((${#FAILED[@]} == 0)) || refuse "${FAILED[*]}: nothing after it could end well"
[[ -z $HUSAI_SERVER ]] || WARM=(python -S scripts/experiments/warm.py run "$HUSAI_SERVER")
stage subject "$OUTPUT/subjects" python scripts/training/train_modular_addition.py --device "$DEVICE" --artifact-root "$OUTPUT"
stage harvest "$OUTPUT/activations" python scripts/analysis/extract_activations.py --model-name "$SUBJECT" --hook-name "$HOOK" \
  --rows "${STUDY[1]}" "${SOURCE[@]}" --device "$DEVICE" --artifact-root "$OUTPUT"

# ----------------------------------------------------------------------------------------------------------------------
# Internal phases: modular addition with the positive control, the language model, what can be changed

run phase4a phase4a_trained_vs_random experiments/run_phase4a_reproduction.py --seeds "$SEEDS" "${POSITIVE[@]}"
run phase4a_lm phase4a_language_model experiments/run_phase4a_reproduction.py --seeds "$SEEDS" --model-name "$SUBJECT" \
  --hook-name "$HOOK" "${SOURCE[@]}" "${CONTROL[@]}"
run ablations core_ablations experiments/run_core_ablations.py --seeds "$SEEDS" "${ABLATIONS[@]}"
run adaptive_l0 adaptive_l0_calibration experiments/run_adaptive_l0_calibration.py --seeds "$SEEDS" "${ADAPTIVE[@]}"
run assignment assignment_consistency_v2 experiments/run_assignment_consistency_v2.py --seeds "$SEEDS" "${ASSIGNMENT[@]}"

# ----------------------------------------------------------------------------------------------------------------------
# External benchmarks, and the studies that are scored on them

run benchmarks official_external_benchmarks experiments/run_official_external_benchmarks.py --model-name "$SUBJECT" \
  --hook-name "$HOOK" "${SOURCE[@]}" --dataset-names "$DATASETS" "${REPO[@]}" "${STORIES[@]}" "${BENCHMARKS[@]}"
run frontier architecture_frontier experiments/run_architecture_frontier_external.py --model-name "$SUBJECT" --hook-name "$HOOK" \
  --run-saebench --run-cebench --dataset-names "$DATASETS" "${STUDY[@]}" "${FRONTIER[@]}" "${MAP[@]}" "${REPO[@]}" \
  "${STORIES[@]}" "${SOURCE[@]}"
run scaling external_metric_scaling experiments/run_external_metric_scaling_study.py --model-name "$SUBJECT" --executor "$EXECUTOR" \
  --run-saebench --run-cebench --dataset-names "$DATASETS" "${STUDY[@]}" "${SCALING[@]}" "${MAP[@]}" "${REPO[@]}" \
  "${STORIES[@]}" "${SOURCE[@]}"

# ----------------------------------------------------------------------------------------------------------------------
# A candidate: chosen, trained again on fresh seeds, put under stress

run selection candidate_selection experiments/select_release_candidate.py --require-both-external \
  --frontier-results "$E/architecture_frontier/results.json" --scaling-results "$E/external_metric_scaling/results.json"
run confirmation candidate_confirmation experiments/run_candidate_confirmation.py \
  --candidate "$E/candidate_selection/results.json" "${MAP[@]}" "${REPO[@]}" "${STORIES[@]}"
CANDIDATE=(--candidate "$E/candidate_confirmation/results.json" "${STRESS[@]}")
run random_model random_model_stress experiments/run_random_model_stress_eval.py "${CANDIDATE[@]}"
run transcoder transcoder_stress experiments/run_transcoder_stress_eval.py "${CANDIDATE[@]}"
run ood ood_stress experiments/run_ood_stress_eval.py "${CANDIDATE[@]}" --skip-families "${SHIFTED[@]}"

# ----------------------------------------------------------------------------------------------------------------------
# The verdict, and what a reader sees

stage gate "$E/release_gate" python scripts/experiments/run_stress_gated_release_policy.py \
  --phase4a-results "$E/phase4a_trained_vs_random/results.json" \
  --random-model-results "$E/random_model_stress/results.json" --transcoder-results "$E/transcoder_stress/results.json" \
  --ood-results "$E/ood_stress/results.json" --external-candidate-json "$E/candidate_selection/results.json" \
  --confirmation-results "$E/candidate_confirmation/results.json" --external-mode joint \
  --study-results "$E/architecture_frontier/results.json" --study-results "$E/external_metric_scaling/results.json" \
  --min-saebench-delta "$MIN_SAEBENCH_DELTA" --min-cebench-delta "$MIN_CEBENCH_DELTA" \
  --require-random-model --require-transcoder --require-ood --require-external --fail-on-gate-fail \
  --output-dir "$E/release_gate"
run features feature_reliability experiments/run_feature_reliability.py "${CANDIDATE[@]}"
stage audit - python scripts/analysis/verify_experiment_consistency.py
stage report "$OUTPUT/report.html" python scripts/analysis/build_report.py --results-root "$E" --output "$OUTPUT/report.html"

[[ -n $DRY ]] && exit 0
echo
((${#UNMET[@]})) && printf 'a check does not hold: %s\n' "${UNMET[@]}"
((${#FAILED[@]})) && printf 'failed: %s\n' "${FAILED[@]}"
case "$GATE" in
  0) echo "the gate is passed" ;;
  1) echo "the gate is not passed: $E/release_gate/release_policy.md says why" ;;
  '') echo "the gate did not run" ;;
  *) echo "the gate could not decide" ;;
esac
[[ -f $OUTPUT/report.html ]] && echo "report   $OUTPUT/report.html"
((${#FAILED[@]} == 0)) || exit 2
[[ -n $GATE ]] || exit "$((${#UNMET[@]} > 0))"
exit "$GATE"
}
