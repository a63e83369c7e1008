"""Measure the speed of a pair's spectral draws, against the code before: group after group, scipy on the plain matrix.

    python benchmarks/null_draws.py

Both draw the null and match its directions one to one, signed, with one thread. The code before turned one group of
components after the other, flipped neighbouring single components together, returned to the coordinates of the
activations, and gave scipy the cosines as they are. HUSAI turns all groups of one size in one call, matches in the
coordinates of the components (which a pair needs once, inside the clock), and subtracts row and column minima. The
two take turns, draw by draw, with draws of their own. A quarter of the components form pairs, as in activations with
few rows. Above 2,048 features another matching is used: benchmarks/matching_speed.py.
"""

import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from husai.kernels.workers import one_torch_thread
from husai.runs.cli import Parser, int_list, positive_int, run_main
from husai.runs.files import write_json, write_text
from husai.runs.machine import cpu_model
from husai.runs.progress import progress
from husai.runs.seeds import generator
from husai.stability.matching import match, unit_rows, worth
from husai.stability.nulls import Spectrum, random_rotations


def spectrum_of(d_in: int) -> Spectrum:
    """Spectrum of d_in components, two of every four with one eigenvalue."""
    values = torch.linspace(4, 0.1, d_in)
    values[1::4] = values[0::4]
    return Spectrum.of(torch.diag(values), 1_000_000)


def runs_of(spectrum: Spectrum) -> list[tuple[slice, bool]]:
    """Columns that the code before drew together: (a group of several, True), or (neighbouring single ones, False)."""
    runs: list[tuple[slice, bool]] = []
    for several, groups in groupby(spectrum.groups, key=lambda group: len(group) > 1):
        parts = [*groups]
        runs += (
            [(slice(g.start, g.stop), True) for g in parts]
            if several
            else [(slice(parts[0].start, parts[-1].stop), False)]
        )
    return runs


def group_by_group(
    a: Tensor, b: Tensor, spectrum: Spectrum, runs: list[tuple[slice, bool]], g: torch.Generator
) -> float:
    """Mean matched cosine of one draw, by the code before."""
    coordinates = b @ spectrum.components
    for columns, rotated in runs:
        part = coordinates[:, columns]
        if rotated:
            coordinates[:, columns] = part @ random_rotations(1, part.shape[1], g)[0]
        else:
            part.mul_(torch.where(torch.rand(part.shape[1], generator=g) < 0.5, 1.0, -1.0))
    cost = worth(unit_rows(a) @ unit_rows(coordinates @ spectrum.components.T).T, signed=True).neg_().double().numpy()
    return float(-cost[linear_sum_assignment(cost)].mean())


def together(x: Tensor, y: Tensor, spectrum: Spectrum, g: torch.Generator) -> float:
    """Mean matched cosine of one draw of HUSAI, from coordinates of the components."""
    return float(match(x, spectrum.turned(y, g), signed=True).cosines.mean())


def timed(function: Callable, *arguments) -> tuple[Any, float]:
    """(result, seconds)."""
    began = time.perf_counter()
    return function(*arguments), time.perf_counter() - began


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--sizes", type=int_list, default="128,256,512,1024", help="features (default: %(default)s)")
    p.add_argument("--d-in", type=positive_int, default=256, help="default: %(default)s")
    p.add_argument("--draws", type=positive_int, default=100, help="default: %(default)s")
    p.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    args = p.parse_args()

    spectrum, rows = spectrum_of(args.d_in), []
    runs = runs_of(spectrum)
    with one_torch_thread(), progress("sizes", len(args.sizes)) as advance:
        for size in args.sizes:
            a, b = (torch.randn(size, args.d_in, generator=generator("null draws", size, i)) for i in range(2))
            (x, y), once = timed(lambda a=a, b=b: (a @ spectrum.components, b @ spectrum.components))
            seconds, means = np.zeros((2, args.draws + 1)), np.zeros((2, args.draws + 1))
            for i in range(args.draws + 1):
                streams = [generator(way, size, i) for way in ("before", "after")]
                means[0, i], seconds[0, i] = timed(group_by_group, a, b, spectrum, runs, streams[0])
                means[1, i], seconds[1, i] = timed(together, x, y, spectrum, streams[1])
            before, after = seconds[:, 1:].sum(1)  # the first draw loads and compiles
            difference = means[0, 1:].mean() - means[1, 1:].mean()
            error = np.hypot(*means[:, 1:].std(1)) / args.draws**0.5
            row = {"size": size, "before": before, "after": after + once, "difference": difference, "error": error}
            rows.append({name: float(value) for name, value in row.items()})
            advance(1)
    write_json(args.output_dir / "null_draws.json", {"cpu": cpu_model(), "draws": args.draws, "rows": rows})
    lines = [
        "# Draws of the spectral null",
        "",
        f"`python benchmarks/null_draws.py`: {args.draws} draws of a pair at d_in {args.d_in}, one thread, "
        f"{cpu_model()}. The difference is that of the mean matched cosines, with its standard error over draws.",
        "",
        "| features | before, s | after, s | ratio | difference |",
        "|---" * 5 + "|",
    ]
    for r in rows:
        before, after = r["before"], r["after"]
        lines.append(
            f"| {r['size']:,.0f} | {before:.2f} | {after:.2f} | {before / after:.1f} | "
            f"{r['difference']:+.4f} ± {r['error']:.4f} |"
        )
    text = "\n".join(lines) + "\n"
    write_text(args.output_dir / "null_draws.md", text)
    print(text)


if __name__ == "__main__":
    run_main(main)
