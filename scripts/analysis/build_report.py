"""The report card: verdict, evidence and features on one HTML page that needs no network.

    python scripts/analysis/build_report.py
    python scripts/analysis/build_report.py --results-root results/experiments --output report.html
    python scripts/analysis/build_report.py --results-root docs/evidence --gate GATE/results.json

Made from nothing but what runs have left: each folder below --results-root with its results, summary and figures, each
checked against its own manifest. A damaged or unfinished run is named on the page, and the others are shown. The page
says that nothing may be claimed externally unless a gate decision says that something may; it decides nothing itself,
and its exit code is 0 whatever the verdict.
"""

from pathlib import Path

from husai.runs.cli import Parser, run_main
from husai.runs.inputs import not_at_all


def parse():
    p = Parser(__doc__)
    p.add_argument(
        "--results-root",
        type=Path,
        default=Path("results/experiments"),
        counts=not_at_all,
        help="holds a folder a phase (default: %(default)s)",
    )
    p.add_argument("--gate", type=Path, help="a gate's results.json (default: that of the gate run below RESULTS_ROOT)")
    p.add_argument("--output", type=Path, default=Path("report.html"), counts=not_at_all, help="default: %(default)s")
    return p.parse_args()


def main() -> None:
    args = parse()
    from husai.report.card import render
    from husai.runs.files import write_text

    page = render(args.results_root, args.gate, args.output)
    write_text(args.output, page)
    print(f"report  {args.output} ({len(page.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_main(main)
