"""Profile the demo: seconds of each stage and of each kind of work.

    python benchmarks/demo_profile.py
    python benchmarks/demo_profile.py --against OTHER_CHECKOUT     # another version of the code, in the same run
    python benchmarks/demo_profile.py --profile smoke --output-dir /tmp/profile

The queue runs without cached files, then again. Each of its Python processes samples the stack of its main thread, and
records its CPU time at its end. `--against` names a checkout with its own .venv. That checkout runs first, and ratios
are given. Times do not include the install.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INTERVAL = 0.01  # seconds between samples
KINDS = {  # kind of work -> parts of a frame's module or path; the innermost frame that matches decides
    "imports": ("<frozen importlib", "importlib/"),
    "cross-entropy with SAEs": ("husai/training/recovered",),
    "probing": ("sae_probes", "sae_bench", "sklearn/", "glum/", "husai/evals/ood", "husai/activations/probes"),
    "training SAEs": ("husai/training/", "husai/kernels/"),
    "training the transformer": ("husai/subjects/modular_addition",),
    "scores and nulls": ("husai/stability/",),
    "activations": ("husai/activations/",),
    "contrastive scores": ("husai/evals/contrastive", "husai/evals/cebench"),
    "figures and report": ("matplotlib/", "husai/report/", "jinja2/"),
    "text": ("husai/subjects/text", "pandas/"),
    "files and digests": ("husai/runs/files", "husai/runs/cells", "husai/runs/folder", "queue_manifest"),
}
OTHER = "other"


# ---------------------------------------------------------------------------------------------------------------------
# Code inside each process of the queue


def kind_of(frame) -> str:
    """Kind of work of a stack."""
    while frame is not None:
        name = frame.f_code.co_filename
        for kind, parts in KINDS.items():
            if any(part in name for part in parts):
                return kind
        frame = frame.f_back
    return OTHER


def sample(folder: Path) -> None:
    """Start to sample the main thread; writes a file when the process ends."""
    began, counts, main = time.monotonic(), Counter(), threading.main_thread().ident
    sampler, ended = None, threading.Event()

    def start() -> None:
        nonlocal sampler, ended
        sampler, ended = threading.Thread(target=loop, daemon=True), threading.Event()
        sampler.start()

    def forked() -> None:
        """Restart the sampler in a forked child, without the time and samples of its parent."""
        nonlocal began
        began = time.monotonic()
        counts.clear()
        start()

    def loop() -> None:
        while not ended.wait(INTERVAL):
            frame = sys._current_frames().get(main)
            if frame is not None:
                counts[kind_of(frame)] += 1

    def leave() -> None:
        ended.set()  # a thread that is alive at interpreter shutdown can abort the process
        sampler.join()
        times = os.times()
        record = {"pid": os.getpid(), "parent": os.getppid(), "argv": sys.argv, "cpu": times.user + times.system}
        record |= {"began": began, "wall": time.monotonic() - began, "samples": dict(counts)}
        (folder / f"{os.getpid()}.json").write_text(json.dumps(record))

    start()
    atexit.register(leave)
    os.register_at_fork(after_in_child=forked)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def main() -> None:
    from husai.runs.cli import Parser
    from husai.runs.files import write_json, write_text
    from husai.runs.machine import cpu_model, usable_cores

    p = Parser(__doc__)
    p.add_argument("--profile", default="embedded", help="profile of the queue (default: %(default)s)")
    p.add_argument("--checkout", type=Path, default=ROOT, help="the version to measure (default: this one)")
    p.add_argument("--keep", type=Path, help="folder for the results of its first run")
    p.add_argument("--against", type=Path, help="a checkout of another version, with its .venv")
    p.add_argument("--output-dir", type=Path, default=ROOT / "docs/benchmarks", help="default: %(default)s")
    args = p.parse_args()
    if args.against is not None and not (args.against / ".venv/bin/python").is_file():
        p.error(f"--against {args.against}: a checkout with an environment expected (make setup there)")
    versions = {"before": args.against, "after": args.checkout} if args.against else {"after": args.checkout}
    result = {}
    for name, checkout in versions.items():
        result[name] = measured(checkout, args.profile, args.keep if name == "after" else None)
    result |= {"cpu": cpu_model(), "cores": usable_cores(), "profile": args.profile}
    write_json(args.output_dir / "demo_profile.json", result)
    write_text(args.output_dir / "demo_profile.md", text := markdown(result))
    print(text)


def measured(checkout: Path, profile: str, keep: Path | None) -> dict:
    """Run a checkout's queue twice, first without cache; {"first", "repeat": {"wall", "cpu", "stages", "kinds"}}."""
    with tempfile.TemporaryDirectory() as folder:
        if keep:
            keep.mkdir(parents=True)
            (Path(folder) / "results").symlink_to(keep.resolve())
        measurements = {}
        for name in ("first", "repeat"):
            notes = Path(folder) / name
            notes.mkdir()
            measurements[name] = ran(checkout, profile, Path(folder) / "results", notes)
        stages = json.loads((Path(folder) / "results/queue/manifest.json").read_text())["stages"]
        measurements["first"]["stages"] = {s["stage"]: s["seconds"] for s in stages}
        return measurements


def ran(checkout: Path, profile: str, results: Path, notes: Path) -> dict:
    """Run the queue once, with a sampler in each Python process; returns its measurements."""
    hook = f"import sys\nsys.path.append({str(ROOT / 'benchmarks')!r})\nimport demo_profile\nfrom pathlib import Path\n"
    hook += f"demo_profile.sample(Path({str(notes)!r}))\n"
    (notes / "sitecustomize.py").write_text(hook)
    code = f"{notes}:{checkout.resolve() / 'src'}"  # the checkout's own source, even if checkouts share an environment
    variables = {"PROFILE": profile, "OUTPUT": str(results), "PYTHONPATH": code}
    variables["PATH"] = f"{checkout}/.venv/bin:{os.environ['PATH']}"
    began = time.monotonic()
    command = ["bash", "scripts/experiments/run_b200_high_impact_queue.sh"]
    with open(notes / "log", "w") as log:
        done = subprocess.run(
            command, cwd=checkout, env=os.environ | variables, stdout=log, stderr=log, timeout=3600, check=False
        )
    if done.returncode not in (0, 1):
        errors = [line for line in (notes / "log").read_text().splitlines() if line.startswith(("error", "failed"))]
        raise SystemExit(f"the queue of {checkout} ended with {done.returncode}: {'; '.join(errors)}")
    wall = time.monotonic() - began
    processes = [json.loads(path.read_text()) for path in notes.glob("*.json")]
    kinds, scripts = Counter(), {}
    # The CPU time of a process is divided over its samples: a sample while threads work counts for all of them.
    for process in processes:
        total, script = sum(process["samples"].values()), Path(process["argv"][0]).name
        for kind, n in process["samples"].items():
            kinds[kind] += process["cpu"] * n / total
            of_script = scripts.setdefault(script, {})
            of_script[kind] = of_script.get(kind, 0.0) + process["cpu"] * n / total
    cpu = sum(process["cpu"] for process in processes)
    return {"wall": wall, "cpu": cpu, "kinds": dict(kinds.most_common()), "scripts": scripts}


def markdown(r: dict) -> str:
    after, before = r["after"], r.get("before")
    lines = [
        "# The demo's time",
        "",
        f"`python benchmarks/demo_profile.py{' --against CHECKOUT' if before else ''}`: the queue's `{r['profile']}` "
        f"profile from nothing, {r['cores']} cores ({r['cpu']}), after the install.",
        "",
    ]
    rows = [
        ["wall clock, first run, s", *(v["first"]["wall"] for v in (before, after) if v)],
        ["CPU time, first run, s", *(v["first"]["cpu"] for v in (before, after) if v)],
        ["wall clock, repeat, s", *(v["repeat"]["wall"] for v in (before, after) if v)],
    ]
    parts = [("The whole", rows)]
    for title, get in (
        ("Seconds by stage (wall clock)", lambda v: v["first"]["stages"]),
        ("CPU seconds by kind of work", lambda v: v["first"]["kinds"]),
    ):
        names = dict.fromkeys(name for v in (before, after) if v for name in get(v))
        parts.append((title, [[n, *(get(v).get(n, 0.0) for v in (before, after) if v)] for n in names]))
    for title, rows in parts:
        lines += [f"## {title}", ""]
        lines += ["| | before | after | ratio |", "|---|---|---|---|"] if before else ["| | seconds |", "|---|---|"]
        for name, *values in rows:
            ratio = [f"{values[0] / values[1]:.1f}" if values[1] else "–"] if before else []
            lines.append(f"| {name} | {' | '.join([*(f'{v:.1f}' for v in values), *ratio])} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    from husai.runs.cli import run_main

    run_main(main)
