"""Measure the cost of waiting threads: one run alone, and two runs on the same cores.

    python benchmarks/two_runs.py
    python benchmarks/two_runs.py --rounds 5

OpenMP's threads spin while they wait, unless OMP_WAIT_POLICY=passive makes them sleep. Both settings are measured. Each
run is a small phase 4a in a separate process that reads the stored subject and activations. Ratios are computed within
a round, and medians over rounds are reported.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from husai.runs.cli import Parser, positive_int, run_main
from husai.runs.files import write_json, write_text
from husai.runs.machine import cpu_model

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/experiments/run_phase4a_reproduction.py"
SIZES = ["--seeds", "42,123,456", "--tokens", "150000", "--null-draws", "20"]
POLICIES = {"spin": {"GOMP_SPINCOUNT": "300000"}, "sleep": {"OMP_WAIT_POLICY": "passive"}}
"""The number is libgomp's own where nothing is set (its manual, "GOMP_SPINCOUNT")."""


def main() -> None:
    p = Parser(__doc__)
    p.add_machine()
    p.add_argument("--rounds", type=positive_int, default=3, help="default: %(default)s")
    p.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    args = p.parse_args()
    times: dict[str, dict[str, list[float]]] = {policy: {"alone": [], "two": []} for policy in POLICIES}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        seconds(root, args, "sleep", 1)  # makes the files that all runs share
        for _ in range(args.rounds):
            for policy in POLICIES:
                times[policy]["alone"].append(seconds(root, args, policy, 1))
                times[policy]["two"].append(seconds(root, args, policy, 2))
    first = times["spin"]
    rows = [
        {
            "policy": policy,
            "seconds": {n: median(times_of_rounds) for n, times_of_rounds in t.items()},
            "ratio": {
                n: median(a / b for a, b in zip(first[n], times_of_rounds, strict=True))
                for n, times_of_rounds in t.items()
            },
            "times": t,
        }
        for policy, t in times.items()
    ]
    result = {"cpu": cpu_model(), "threads": args.threads, "rounds": args.rounds, "rows": rows}
    write_json(args.output_dir / "two_runs.json", result)
    write_text(args.output_dir / "two_runs.md", text := markdown(result))
    print(text)


def seconds(root: Path, args, policy: str, runs: int) -> float:
    """Seconds from the common start of `runs` runs to the end of the last one."""
    policy_variables = set().union(*POLICIES.values())
    environment = {name: value for name, value in os.environ.items() if name not in policy_variables} | POLICIES[policy]
    command = [sys.executable, str(SCRIPT), *SIZES, "--force", "--artifact-root", str(root)]
    command += ["--device", args.device, "--threads", str(args.threads)]
    null, began = subprocess.DEVNULL, time.perf_counter()
    processes = [
        subprocess.Popen([*command, "--output-dir", str(root / f"run{i}")], env=environment, stdout=null, stderr=null)
        for i in range(runs)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError("a run failed")
    return time.perf_counter() - began


def markdown(result: dict) -> str:
    lines = [
        "# Two runs on the same cores",
        "",
        f"{result['cpu']}, {result['threads']} threads a run, medians of {result['rounds']} rounds. A ratio above 1: "
        "so many times faster than with threads that spin. `python benchmarks/two_runs.py`",
        "",
        "| waiting threads | one run (s) | ratio | two at once (s) | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        s, r = row["seconds"], row["ratio"]
        cells = f"{s['alone']:.1f} | {r['alone']:.2f} | {s['two']:.1f} | {r['two']:.2f}"
        lines.append(f"| {row['policy']} | {cells} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_main(main)
