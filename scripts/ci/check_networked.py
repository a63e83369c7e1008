"""Check an SAE's held-out figures against the figures that SAELens' catalogue states.

python scripts/ci/check_networked.py SAEBENCH/results.json sae-lens:RELEASE/SAE_ID
"""

import argparse
from pathlib import Path

from husai.runs.cli import Parser, run_main
from husai.runs.errors import CheckFailed
from husai.runs.files import read_json

BELOW, FACTOR = 0.1, 2.0
"""Largest deficit of explained variance, and largest factor of L0. The texts differ, so figures differ too."""


def main() -> None:
    p: argparse.ArgumentParser = Parser(__doc__)
    p.add_argument("results", type=Path, help="results.json of run_husai_saebench_custom_eval.py on this SAE")
    p.add_argument("name", type=Path, help="name of the SAE in the catalogue")
    args = p.parse_args()
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    from husai.dictionaries import sources

    release, sae_id = sources.refuse_unknown(args.name)
    stated = get_pretrained_saes_directory()[release]
    explained, l0 = stated.expected_var_explained[sae_id], stated.expected_l0[sae_id]
    (sae,) = read_json(args.results, "networked check")["saes"]
    heldout = sae["heldout"]
    for holds, statement in (
        (
            heldout["explained_variance"] > explained - BELOW,
            f"EV {heldout['explained_variance']:.3f}, stated {explained}",
        ),
        (l0 / FACTOR < heldout["l0"] < l0 * FACTOR, f"L0 {heldout['l0']:.1f}, stated {l0}"),
    ):
        if not holds:
            raise CheckFailed(f"networked check: {statement}")
        print(f"ok  {statement}")


if __name__ == "__main__":
    run_main(main)
