"""Build one HTML page about SAEs: their quality, which results can be trusted, which gates failed, and the next steps.

    python scripts/analysis/build_report.py
    python scripts/analysis/build_report.py --results-root results/experiments --output report.html
    python scripts/analysis/build_report.py --results-root docs/evidence --gate GATE/results.json

The page needs no network. The script reads results, summary and figures of each run below --results-root, and checks
them against the run's manifest. A damaged or unfinished run is named, and the other runs are shown. The page decides
nothing. Without the decision of a release gate it states that nothing may be claimed externally. Exit 0 for every
verdict, 2 for bad input.
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
    p.add_argument(
        "--command",
        metavar="TEXT",
        help="command line of the release check; steps that the page suggests begin with it (default: that of the "
        "manifest)",
    )
    p.add_argument("--output", type=Path, default=Path("report.html"), counts=not_at_all, help="default: %(default)s")
    return p.parse_args()


def main() -> None:
    args = parse()
    from husai.report.card import render
    from husai.runs.files import write_text

    page = render(args.results_root, args.gate, args.output, args.command)
    write_text(args.output, page)
    print(f"report  {args.output} ({len(page.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_main(main)
