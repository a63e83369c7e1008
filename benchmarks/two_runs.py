"""What waiting threads cost: one run alone, and two on the same cores, with threads that spin while they wait, as
OpenMP has them unless it is told otherwise, and with threads that sleep (OMP_WAIT_POLICY=passive).

    python benchmarks/two_runs.py
    python benchmarks/two_runs.py --rounds 5

Each run is a small phase 4a in a process of its own, from the stored subject and activations on. Ratios are of times
within a round; medians over rounds are reported.
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
        seconds(root, args, "sleep", 1)  # makes what all of them share
        for _ in range(args.rounds):
            for policy in POLICIES:
                times[policy]["alone"].append(seconds(root, args, policy, 1))
                times[policy]["two"].append(seconds(root, args, policy, 2))
    first = times["spin"]
    rows = [
        {
            "policy": policy,
            "seconds": {n: median(of) for n, of in t.items()},
            "ratio": {n: median(a / b for a, b in zip(first[n], of, strict=True)) for n, of in t.items()},
            "times": t,
        }
        for policy, t in times.items()
    ]
    result = {"cpu": cpu_model(), "threads": args.threads, "rounds": args.rounds, "rows": rows}
    write_json(args.output_dir / "two_runs.json", result)
    write_text(args.output_dir / "two_runs.md", text := markdown(result))
    print(text)


def seconds(root: Path, args, policy: str, runs: int) -> float:
    """From the start of so many runs at once to the end of the last one."""
    ours = set().union(*POLICIES.values())
    environment = {name: value for name, value in os.environ.items() if name not in ours} | POLICIES[policy]
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
