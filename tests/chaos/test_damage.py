"""One artefact of each kind is damaged: it is named, and made again to the same bytes, or refused.

17 kinds at once are all named before anything runs, and made again; the stages before them stand. All stages rest on
the transformer and the store. Damage to any of their files is refused with one line and exit code 2. Once the store's
folder is removed, the same command makes the same bytes. The kill test makes the transformer again from nothing.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

MADE_AGAIN = [  # the kind, where it lies, what is done to it
    ("checkpoint weights", "experiments/phase4a_trained_vs_random/checkpoints/*/*/sae_weights.safetensors", "flip"),
    ("snapshots", "experiments/phase4a_language_model/checkpoints/*/*/snapshots.safetensors", "cut"),
    ("pair cell", "experiments/phase4a_language_model/cells/pair-*.json", "cut"),
    ("figure", "experiments/core_ablations/figures/*.png", "flip"),
    ("results", "experiments/core_ablations/results.json", "empty"),
    ("summary", "experiments/adaptive_l0_calibration/summary.md", "cut"),
    ("checkpoint configuration", "experiments/assignment_consistency_v2/checkpoints/*/*/cfg.json", "empty"),
    ("reference", "experiments/architecture_frontier/checkpoints/*/relu_*/sae_weights.safetensors", "flip"),
    ("phase cell", "experiments/external_metric_scaling/cells/external_metric_scaling-*.json", "flip"),
    ("training cell", "experiments/candidate_confirmation/cells/training-*.json", "gone"),
    ("candidate", "experiments/candidate_confirmation/checkpoints/*/*/sae_weights.safetensors", "flip"),
    ("control", "controls/checkpoints/*/*/sae_weights.safetensors", "empty"),
    ("stress results", "experiments/ood_stress/results.json", "flip"),
    ("decision", "experiments/release_gate/release_policy.json", "flip"),
    ("decision to read", "experiments/release_gate/release_policy.md", "gone"),
    ("features", "experiments/feature_reliability/results.json", "cut"),
    ("report", "report.html", "cut"),
]
REFUSED = {  # the stage that made them and says so: its files
    "subject": ("model.safetensors", "subject.json"),
    "harvest": ("shard-00000.safetensors", "manifest.json"),
}


def damage(path, how):
    data = path.read_bytes()
    assert data, f"{path} holds nothing to damage"
    if how == "gone":
        path.unlink()
    elif how == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        path.write_bytes(data[: len(data) // 2] if how == "cut" else b"")


def test_what_can_be_made_again_is(undisturbed, tmp_path):
    """All kinds at once: every one is named before anything runs."""
    queue = undisturbed.copied_to(tmp_path / "damaged")
    damaged = {}
    for kind, where, how in MADE_AGAIN:
        damaged[kind] = sorted(queue.out.glob(where))[0]
        damage(damaged[kind], how)
    code, said = queue.run()
    assert code == 1, said
    assert "failed:" not in said
    before = said[: said.index("\n== phase4a")]
    assert [kind for kind, path in damaged.items() if str(path) not in before] == []
    assert queue.stages()[:2] == ["environment", "phase4a"], "what comes before the damage stands"
    assert queue.unlike(undisturbed) == []
    assert (queue.out / "report.html").read_text().rstrip().endswith("</html>")
    damage(sorted(queue.out.glob("experiments/feature_reliability/results.json"))[0], "flip")
    assert queue.run()[0] == 1
    assert queue.stages() == ["environment", "gate", "features", "audit", "report"], "what comes before stands"
    assert queue.unlike(undisturbed) == []


@pytest.mark.parametrize("stage", REFUSED)
def test_what_everything_rests_on_is_refused(undisturbed, tmp_path, stage):
    """Each file of the stage's folder in its turn. A removed store is made again to the same bytes."""
    queue = undisturbed.copied_to(tmp_path / "refused")
    stages = json.loads((queue.out / "queue/manifest.json").read_text())["stages"]
    (files,) = (s["files"] for s in stages if s["stage"] == stage)
    for name in REFUSED[stage]:
        (path,) = (Path(f) for f in files if f.endswith(f"/{name}"))
        whole = path.read_bytes()
        damage(path, "flip")
        code, said = queue.run("--only", stage)
        assert code == 2, name
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert str(path.parent) in errors[0]
        assert re.search(rf"^failed: {stage} .*\b2\b", said, re.M)
        path.write_bytes(whole)
    if stage == "harvest":  # to train the transformer again takes 40 s, and the kill test does
        shutil.rmtree(path.parent)
        assert queue.run("--only", stage)[0] == 0
    assert queue.unlike(undisturbed) == []
