"""Measure the speed of a pair's spectral draws, against a draw group by group and scipy on the plain matrix.

    python benchmarks/null_draws.py

Both draw the null and match its directions one to one, signed, with one thread. `group by group` turns one group of
components after the other, returns to the coordinates of the activations, and gives scipy the matrix of cosines as it
is. HUSAI turns all groups of one size in one call, matches in the coordinates of the components, and subtracts what
every assignment pays. The two take turns, draw by draw. Half of the components are alone, half in pairs, as in
activations with few rows. Both find the optimum of their draw; the means agree within the error of the draws.
"""

import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from husai.kernels.workers import one_torch_thread
from husai.runs.cli import Parser, int_list, positive_int, run_main
from husai.runs.files import write_json, write_text
from husai.runs.machine import cpu_model
from husai.runs.progress import progress
from husai.runs.seeds import generator
from husai.stability.matching import match, unit_rows
from husai.stability.nulls import Spectrum, random_rotations


def spectrum_of(d_in: int) -> Spectrum:
    """Spectrum of d_in components, every second pair of which has one eigenvalue."""
    values = torch.linspace(4, 0.1, d_in)
    values[1::4] = values[0::4]
    return Spectrum.of(torch.diag(values), 1_000_000)


def group_by_group(a: torch.Tensor, b: torch.Tensor, spectrum: Spectrum, g: torch.Generator) -> float:
    """Mean matched cosine of one draw."""
    coordinates = b @ spectrum.components
    for group in spectrum.groups:
        columns = slice(group.start, group.stop)
        coordinates[:, columns] = coordinates[:, columns] @ random_rotations(1, len(group), g)[0]
    cosines = (unit_rows(a) @ unit_rows(coordinates @ spectrum.components.T).T).clamp_min(0).double().numpy()
    return float(cosines[linear_sum_assignment(-cosines)].mean())


def together(x: torch.Tensor, y: torch.Tensor, spectrum: Spectrum, g: torch.Generator) -> float:
    """The same of a draw of HUSAI, from coordinates of the components."""
    return float(match(x, spectrum.turned(y, g), signed=True).cosines.mean())


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--sizes", type=int_list, default="128,256,512,1024", help="features (default: %(default)s)")
    p.add_argument("--d-in", type=positive_int, default=256, help="default: %(default)s")
    p.add_argument("--draws", type=positive_int, default=100, help="default: %(default)s")
    p.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    args = p.parse_args()

    spectrum, rows = spectrum_of(args.d_in), []
    with one_torch_thread(), progress("sizes", len(args.sizes)) as advance:
        for size in args.sizes:
            a, b = (torch.randn(size, args.d_in, generator=generator("null draws", size, i)) for i in range(2))
            x, y = a @ spectrum.components, b @ spectrum.components
            ways = {"group by group": (group_by_group, a, b), "HUSAI": (together, x, y)}
            seconds, means = {name: [] for name in ways}, {name: [] for name in ways}
            for draw in range(args.draws + 1):
                for name, (way, *pair) in ways.items():
                    began = time.perf_counter()
                    mean = way(*pair, spectrum, generator(name, size, draw))
                    if draw:  # the first loads and compiles
                        seconds[name].append(time.perf_counter() - began)
                        means[name].append(mean)
            error = np.hypot(*(np.std(m) for m in means.values())) / args.draws**0.5
            row = {"size": size} | {name: sum(s) for name, s in seconds.items()}
            rows.append(row | {"difference": float(np.subtract(*map(np.mean, means.values()))), "error": float(error)})
            advance(1)
    write_json(args.output_dir / "null_draws.json", {"cpu": cpu_model(), "draws": args.draws, "rows": rows})
    lines = [
        "# Draws of the spectral null",
        "",
        f"`python benchmarks/null_draws.py`: {args.draws} draws of a pair at d_in {args.d_in}, one thread, "
        f"{cpu_model()}. The difference is that of the mean matched cosines, with its standard error over draws.",
        "",
        "| features | group by group, s | HUSAI, s | ratio | difference |",
        "|---" * 5 + "|",
    ]
    for r in rows:
        before, after = r["group by group"], r["HUSAI"]
        lines.append(
            f"| {r['size']:,} | {before:.2f} | {after:.2f} | {before / after:.1f} | "
            f"{r['difference']:+.4f} ± {r['error']:.4f} |"
        )
    text = "\n".join(lines) + "\n"
    write_text(args.output_dir / "null_draws.md", text)
    print(text)


if __name__ == "__main__":
    run_main(main)
