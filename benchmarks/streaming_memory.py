"""Measure the peak memory of harvesting a generated text and training on it, for several sizes of the text.

    python benchmarks/streaming_memory.py --gigabytes 10
    python benchmarks/streaming_memory.py --gigabytes 1 --rows 200000

The script writes jsonl files of random words in several sizes, the last of --gigabytes. A separate process streams each
file once to its end without rows (hashes, duplicates), and then trains SAEs of husai-tiny on --rows of its activations
while they are harvested. The process's peak resident memory may grow with the source by at most 16 bytes a document and
MARGIN. Exit 1 if it grows more.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from husai.runs.cli import Parser, positive_float, positive_int, prepare, run_main
from husai.runs.files import write_json, write_text

SHARES = (0.1, 0.3, 1.0)
MARGIN = 150.0
"""MB."""


def parse():
    p = Parser(__doc__)
    p.add_argument("--gigabytes", type=positive_float, default=10.0, help="largest source (default: %(default)s)")
    p.add_argument("--rows", type=positive_int, default=1_000_000, help="trained on (default: %(default)s)")
    p.add_argument("--buffer-rows", type=positive_int, default=65_536, help="default: %(default)s")
    p.add_argument("--scratch", type=Path, help="folder for sources (default: the system's)")
    p.add_argument("--source", type=Path, help="measure this one alone, and print JSON")
    p.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    p.add_machine()
    return p.parse_args()


def main() -> None:
    args = parse()
    if args.source is not None:
        print(json.dumps(measure(args)))
        return
    from husai.runs.errors import CheckFailed

    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for share in SHARES:
            source = Path(scratch) / "text.jsonl"
            size = generate(source, int(share * args.gigabytes * 1e9))
            command = [sys.executable, __file__, "--source", str(source), "--rows", str(args.rows)]
            command += ["--buffer-rows", str(args.buffer_rows), "--threads", str(args.threads), "--device", args.device]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"megabytes": size / 1e6} | json.loads(done.stdout.splitlines()[-1]))
    growth = rows[-1]["peak_mb"] - rows[0]["peak_mb"]
    allowed = MARGIN + 16e-6 * rows[-1]["documents"]
    settings = {"rows_trained": args.rows, "buffer_rows": args.buffer_rows, "threads": args.threads}
    results = settings | {"sources": rows, "growth_mb": growth, "allowed_mb": allowed}
    write_json(args.output_dir / "streaming_memory.json", results)
    write_text(args.output_dir / "streaming_memory.md", summary(results))
    print(summary(results))
    if growth > allowed:
        raise CheckFailed(f"peak memory grew by {growth:.0f} MB; at most {allowed:.0f} MB expected")


def generate(path: Path, size: int) -> int:
    """Write documents of random words, `size` bytes in all; returns the number of documents."""
    draw, written = random.Random(0), 0
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(5000)]
    with open(path, "w") as f:
        while written < size:
            written += f.write(json.dumps({"text": " ".join(draw.choices(words, k=300))}) + "\n")
    return written


def measure(args) -> dict:
    """Read a source to its end, and then train on a stream of it."""
    device = prepare(args.device, args.threads)
    from husai.activations.language_model import Inputs
    from husai.activations.stream import ActivationStream
    from husai.subjects import pretrained
    from husai.subjects.sources import TextSource
    from husai.training.grid import members
    from husai.training.trainer import Training, TrainingConfig, run_together

    subject, source = pretrained.load("husai-tiny", device=device), TextSource(str(args.source))
    began = time.monotonic()
    reading = source.training().read(subject.tokenizer)
    for _ in reading:
        pass
    read = time.monotonic() - began
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Inputs.of(subject, source.training(), args.rows, 0, Path(scratch))
        stream = ActivationStream(subject, ["blocks.1.hook_resid_pre"], inputs, args.buffer_rows)
        config = TrainingConfig(tokens=args.rows, batch_size=1024, window_rows=args.buffer_rows)
        (of_hook,) = stream.hooks.values()
        grid = members([42, 123], [512], [16], [3e-3])
        began = time.monotonic()
        run_together([Training(of_hook, grid, config, device, Path(scratch) / "state", in_order=True)])
        trained = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = {"seconds_reading": read, "seconds_training": trained, "seconds_model": stream.seconds}
    return {"documents": reading.record["documents"], "peak_mb": peak} | times


def summary(results: dict) -> str:
    lines = [
        "# Peak memory of a stream",
        "",
        f"`python benchmarks/streaming_memory.py --gigabytes {results['sources'][-1]['megabytes'] / 1000:.1f} --rows "
        f"{results['rows_trained']}` writes a jsonl of random words, reads it to its end, and trains two SAEs of "
        f"husai-tiny on {results['rows_trained']:,} rows while they are harvested (a buffer of "
        f"{results['buffer_rows']:,} rows, {results['threads']} threads). The machine had other work at the same time.",
        "",
        "| source, MB | documents | peak, MB | seconds: reading | training, of which the model |",
        "|---|---|---|---|---|",
    ]
    for r in results["sources"]:
        times = f"{r['seconds_reading']:.0f} | {r['seconds_training']:.0f}, {r['seconds_model']:.0f}"
        lines.append(f"| {r['megabytes']:.0f} | {r['documents']:,} | {r['peak_mb']:.0f} | {times} |")
    lines += [
        "",
        f"From the smallest source to the largest the peak changes by {results['growth_mb']:+.0f} MB; "
        f"{results['allowed_mb']:.0f} MB are allowed, 16 bytes a document among them.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
