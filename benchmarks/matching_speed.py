"""Measure the speed of matching two dictionaries: HUSAI's matching against scipy's assignment on the dense matrix.

    python benchmarks/matching_speed.py
    python benchmarks/matching_speed.py --sizes 4096,8192,16384 --dense-up-to 16384

There are three kinds of pairs: half of the features shared, at cosines of 0.5 to 0.99; none shared (as in a null, which
is drawn many times); and none shared in an anisotropic space (spectrum 1/i), where features are dense as in
activations. Each matching runs in a separate process with one thread. The time is that of the whole score, from two
decoders to the mean |cos|. The memory is the peak of the process less its memory before the matching.
"""

import resource
import time
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from husai.runs.cli import Parser, int_list, positive_int, run_main
from husai.runs.files import write_json, write_text
from husai.runs.machine import cpu_model
from husai.runs.progress import progress

KINDS = {"half shared": (0.5, 0.0), "none shared": (0.0, 0.0), "none shared, anisotropic": (0.0, 1.0)}
"""Share of shared features, and how fast the space's spectrum falls."""


def decoders(size: int, d_in: int, kind: str, seed: int):
    """Pair of dictionaries `[size, d_in]`."""
    import torch

    share, fall = KINDS[kind]
    g = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, d_in + 1) ** -fall
    a, b = (torch.nn.functional.normalize(torch.randn(size, d_in, generator=g) * spectrum, dim=1) for _ in range(2))
    shared = int(share * size)
    cosine = 0.5 + 0.49 * torch.rand(shared, 1, generator=g)
    b[:shared] = cosine * a[:shared] + (1 - cosine**2).sqrt() * b[:shared]
    return a, b[torch.randperm(size, generator=g)]


def matched(size: int, d_in: int, kind: str, seed: int, exact: bool) -> dict:
    """Seconds of one matching, its mean |cos|, the bound of its error, and its memory in GB."""
    import torch

    from husai.stability.matching import match

    torch.set_num_threads(1)
    match(*decoders(100, d_in, kind, seed), exact)  # loads libraries and compiles before the clock starts
    a, b = decoders(size, d_in, kind, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    matching = match(a, b, exact)
    seconds = time.perf_counter() - began
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return {"seconds": seconds, "mcc": float(matching.cosines.mean()), "bound": matching.gap_bound, "gigabytes": memory}


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--sizes", type=int_list, default="4096,8192,16384", help="features (default: %(default)s)")
    p.add_argument("--d-in", type=positive_int, default=512, help="default: %(default)s")
    p.add_argument("--repeats", type=positive_int, default=2, help="repeats of HUSAI's matching (default: %(default)s)")
    p.add_argument("--dense-up-to", type=positive_int, default=16384, help="larger ones are not run dense")
    p.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    args = p.parse_args()

    cases = [(size, kind) for size in args.sizes for kind in KINDS]
    rows = []
    with progress("matching", len(cases)) as advance, get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for size, kind in cases:

            def run(exact: bool, size: int = size, kind: str = kind) -> list[dict]:
                times = 1 if exact else args.repeats
                return [fresh.apply(matched, (size, args.d_in, kind, s, exact)) for s in range(times)]

            own_runs, dense = run(False), run(True) if size <= args.dense_up_to else None
            rows.append({"size": size, "kind": kind, "ours": own_runs, "dense": dense})
            advance(1)
    machine = {"cpu": cpu_model(), "threads": 1}
    versions = {name: version(name) for name in ("torch", "scipy")}
    write_json(args.output_dir / "matching_speed.json", {"machine": machine, "versions": versions, "rows": rows})

    lines = [
        "# Matching speed",
        "",
        f"`python benchmarks/matching_speed.py`: d_in {args.d_in}, one thread, {cpu_model()}; "
        + ", ".join(f"{name} {v}" for name, v in versions.items())
        + f". Medians of {args.repeats} pairs; dense: scipy's `linear_sum_assignment`, the first of these pairs.",
        "",
        "| features | pair | ours, s | dense, s | ratio | ours, GB | dense, GB | gap to the optimum | bound reported "
        "| ten pairs, min |",
        "|---" * 10 + "|",
    ]
    for r in rows:
        seconds, memory = (median(o[key] for o in r["ours"]) for key in ("seconds", "gigabytes"))
        first, dense = r["ours"][0], r["dense"] and r["dense"][0]
        compared = ["not run"] + ["–"] * 3
        if dense:
            ratio = dense["seconds"] / first["seconds"]
            compared = [f"{dense['seconds']:.1f}", f"{ratio:.1f}", f"{dense['gigabytes']:.2f}"]
            compared.append(f"{dense['mcc'] - first['mcc']:.1e}")
        lines.append(
            f"| {r['size']:,} | {r['kind']} | {seconds:.1f} | {compared[0]} | {compared[1]} | {memory:.2f} | "
            f"{compared[2]} | {compared[3]} | {max(o['bound'] for o in r['ours']):.1e} | {10 * seconds / 60:.1f} |"
        )
    text = "\n".join(lines) + "\n"
    write_text(args.output_dir / "matching_speed.md", text)
    print(text)


if __name__ == "__main__":
    run_main(main)
