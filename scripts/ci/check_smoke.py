"""Check the figures of the smoke pipeline: losses fell, L0 = k, scores lie in [0, 1].

python scripts/ci/check_smoke.py SAES/results.json PHASE4A/results.json
"""

import argparse
from pathlib import Path

from husai.runs.cli import Parser, run_main
from husai.runs.errors import CheckFailed
from husai.runs.files import read_json


def check(holds: bool, statement: str) -> None:
    if not holds:
        raise CheckFailed(f"smoke: {statement}")
    print(f"ok  {statement}")


def main() -> None:
    p: argparse.ArgumentParser = Parser(__doc__)
    p.add_argument("saes", type=Path, help="results.json of train_husai_sae_on_cached_activations.py")
    p.add_argument("phase4a", type=Path, help="results.json of run_phase4a_reproduction.py")
    args = p.parse_args()

    saes = read_json(args.saes, "smoke")["members"]
    section = read_json(args.phase4a, "smoke")["husai"]
    for m in [*saes, *section["members"]]:
        name = f"seed {m['seed']}"
        check(
            m["curve"][-1] < 0.5 * m["curve"][0], f"{name}: loss fell from {m['curve'][0]:.3f} to {m['curve'][-1]:.3f}"
        )
        check(0.9 * m["k"] <= m["heldout"]["l0"] <= m["k"], f"{name}: L0 {m['heldout']['l0']:.2f} of k {m['k']}")
        check(
            m["heldout"]["explained_variance"] > 0.5, f"{name}: EV {m['heldout']['explained_variance']:.3f} above 0.5"
        )
    check(
        [m["checkpoint_sha256"] for m in saes] == [m["checkpoint_sha256"] for m in section["members"]],
        "two scripts trained the same SAEs, byte for byte",
    )
    scores = section["stability"]["scores"]
    values = [s["observed"]["estimate"] for s in scores.values()]
    values += [n["mean"] for s in scores.values() for n in s["nulls"].values()]
    check(all(0 <= v <= 1 for v in values), f"{len(values)} scores lie in [0, 1]")
    check(section["stability"]["verdict"]["outcome"] == "MISSING", "three seeds give no verdict")
    trained, random = scores["mcc"]["observed"]["estimate"], scores["mcc"]["nulls"]["isotropic"]["mean"]
    check(trained > random, f"trained SAEs are more alike ({trained:.3f}) than random directions ({random:.3f})")
    print("smoke: all figures hold")


if __name__ == "__main__":
    run_main(main)
