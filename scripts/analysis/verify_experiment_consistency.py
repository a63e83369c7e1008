"""Check that every headline figure follows from its artefact.

    python scripts/analysis/verify_experiment_consistency.py
    python scripts/analysis/verify_experiment_consistency.py --write-digests

The script reads docs/claims.yaml and checks each claim. The document must contain the statement, the artefact must be
unchanged, and the figures must equal the artefact's values. An internal claim must be on a benchmark or an internal
phase; an external claim needs a passed gate that read the artefact. Figures in the documents that need a claim and have
none are reported. Every folder below docs/evidence must hold exactly the files that its manifest names. All conclusions
from pairs of seeds are computed again, including decisions of the gate. --write-digests first records the present
artefacts, after an intended change.
"""

from pathlib import Path

from husai.runs.cli import Parser, run_main
from husai.runs.errors import CheckFailed

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--root", type=Path, default=ROOT, help="folder of relative paths (default: this repository)")
    p.add_argument("--claims", type=Path, help="default: docs/claims.yaml below the root")
    p.add_argument("--write-digests", action="store_true", help="bring the sha256 of the artefacts up to date first")
    args = p.parse_args()
    from husai.release import claims, decisions, recompute

    path = args.claims or args.root / "docs" / "claims.yaml"
    if args.write_digests:
        for change in claims.write_digests(path, args.root):
            print(f"sha256  {change}")
    listed = claims.read(path)
    parts = {
        "claims": claims.audit_claims(listed, args.root),
        "documents": claims.audit_documents(listed, args.root),
        "evidence folders": recompute.audit_evidence(args.root),
        "gate decisions": decisions.audit(args.root),
    }
    for findings in parts.values():
        for name, problems in findings.items():
            print(f"FAIL  {name}: {'; '.join(problems)}" if problems else f"ok    {name}")
    failed = sum(bool(problems) for findings in parts.values() for problems in findings.values())
    counted = ", ".join(f"{len(findings)} {part}" for part, findings in parts.items())
    if failed:
        raise CheckFailed(f"audit: {failed} do not hold, of {counted}")
    print(f"audit: {counted}: all hold")


if __name__ == "__main__":
    run_main(main)
