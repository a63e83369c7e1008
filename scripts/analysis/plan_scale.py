"""Estimate the cost of a study of published scale: GPU-hours, storage, network and CPU-hours, from measured rates.

    python scripts/analysis/plan_scale.py
    python scripts/analysis/plan_scale.py --gpu H100 --utilisation 0.3 --output docs/scaling.md

The script reads training_speed.json, eval_speed.json and streaming_memory.json of docs/benchmarks.
Rates measured on a CPU are converted to a GPU by floating-point operations. The cost of a TopK step
is its dense product, divided by the share of that product's speed that the measured step reaches.
The GPU reaches `--utilisation` of its maker's figure, which is an assumption until it is measured.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from husai.report.text import table
from husai.runs.cli import Parser, fraction, positive_float, run_main
from husai.runs.files import read_json, write_text

GPUS = {"H100": 989e12, "B200": 2250e12}
"""Dense bfloat16 operations a second, as stated by the makers."""
WIDTH = 120
BYTES = 2  # of a stored activation, bfloat16
BUFFER = 2**20
"""Rows of a stream's buffer, as in the RUNBOOK's commands for large models."""


@dataclass(frozen=True)
class ScaleStudy:
    """Sizes of a study."""

    name: str
    d_in: int
    d_sae: int
    parameters: float
    """Number of parameters of the model up to the hook. A harvested token costs twice as many operations."""
    tokens: float = 500e6
    saes: int = 30
    """5 seeds of 6 architectures."""
    layers: int = 1
    data_sets: int = 113


STUDIES = (
    ScaleStudy("Pythia-160M, 16k wide, 1 layer", 768, 16_384, 42e6),
    ScaleStudy("Pythia-160M, 16k wide, 12 layers", 768, 16_384, 85e6, layers=12),
    ScaleStudy("Gemma-2-2B, 65k wide, 1 layer", 2304, 65_536, 1.0e9),
)


def costs(study: ScaleStudy, speed: dict, evals: dict, peak: float, utilisation: float, gigabits: float) -> dict:
    """Costs of one study, in hours unless the name says otherwise."""
    widest = max((r for r in speed["rows"] if "AuxK" not in r["label"]), key=width)
    rates = widest["medians"]
    husai_rate, product = rates["HUSAI, float32 product"], rates["the encoder's dense float32 product alone"]
    rows = study.tokens * study.saes * study.layers
    operations = 2 * study.d_in * study.d_sae * rows / (husai_rate / product)
    # Rows × SAEs a second on the measured machine.
    measured = husai_rate * speed["d_in"] * width(widest) / (study.d_in * study.d_sae)
    harvest = 2 * study.parameters * study.tokens  # all layers in one pass
    probing = next(r for r in evals["rows"] if r["unit"] == "SAEs × data sets")
    core_seconds = probing["seconds"]["ours"] / probing["work"] * evals["threads"]
    stored = study.tokens * study.d_in * BYTES * study.layers
    hours = {
        "training": operations / (peak * utilisation) / 3600,
        "training on the measured machine": rows / measured / 3600,
        "harvest": harvest / (peak * utilisation) / 3600,
        "probing, core-hours": core_seconds * 2 * study.saes * study.layers * study.data_sets / 3600,
        "storage, TB": stored / 1e12,
        "sending the store to a node": stored * 8 / (gigabits * 1e9) / 3600,
    }
    each = {name: hours[name] for name in ("training", "harvest", "sending the store to a node")}
    each["probing on 16 cores"] = hours["probing, core-hours"] / 16
    return hours | {"bottleneck": max(each, key=lambda name: each[name])}


def width(row: dict) -> int:
    """`2 SAEs, d_sae 16,384` -> 16384."""
    return int(row["label"].split("d_sae ")[1].split(", A")[0].replace(",", ""))


def document(speed: dict, evals: dict, memory: dict, args) -> str:
    widest = max((r for r in speed["rows"] if "AuxK" not in r["label"]), key=width)
    rates = widest["medians"]
    share = rates["HUSAI, float32 product"] / rates["the encoder's dense float32 product alone"]
    prompts = next(r for r in evals["rows"] if r["unit"] == "tokens")
    probing = next(r for r in evals["rows"] if r["unit"] == "SAEs × data sets")
    command = "python scripts/analysis/plan_scale.py"
    husai_rate = rates["HUSAI, float32 product"]
    harvest = prompts["work"] / prompts["seconds"]["ours"]
    core_seconds = probing["seconds"]["ours"] / probing["work"] * evals["threads"]
    header = ["study", "training, GPU-h", "on the measured machine, h", "harvest, GPU-h", "store, TB", "to a node, h"]
    header += ["probing, core-h", "bottleneck"]
    lines = [
        "# Past one machine",
        "",
        textwrap.fill(
            f"`{command}` computes this page from [training_speed](benchmarks/training_speed.md) and "
            "[eval_speed](benchmarks/eval_speed.md). No GPU has been measured yet: GPU-hours rest on counted "
            f"operations and on {args.utilisation:.0%} of the maker's figure for one {args.gpu} "
            f"({args.peak / 1e12:.0f} TFLOP/s, bfloat16, dense).",
            WIDTH,
        ),
        "",
        "Measured:",
        "",
        f"- training, {widest['label']}, d_in {speed['d_in']}: {husai_rate:,.0f} rows × SAEs a second "
        f"({share:.0%} of what the dense product alone allows), {speed['machine']['device']}",
        f"- harvest of husai-tiny: {harvest:,.0f} tokens a second, {evals['cpu']}",
        f"- probing: {core_seconds:.2f} core-seconds an SAE and data set, process starts included",
        f"- a stored token: d_in × {BYTES} bytes in bfloat16",
        "",
    ]
    rows = []
    for study in STUDIES:
        c = costs(study, speed, evals, args.peak, args.utilisation, args.gigabits)
        hours = ("training", "training on the measured machine", "harvest", "storage, TB")
        cells = [f"{c[n]:,.1f}" if c[n] < 1000 else f"{c[n]:,.0f}" for n in (*hours, "sending the store to a node")]
        rows.append([study.name, *cells, f"{c['probing, core-hours']:,.0f}", c["bottleneck"]])
    first = STUDIES[0]
    lines += [
        *table(header, rows),
        "",
        textwrap.fill(
            f"Each study: {first.tokens / 1e6:.0f}M tokens, 5 seeds × 6 architectures = {first.saes} SAEs a "
            f"layer, with an untrained one beside each; {first.data_sets} probing data sets at one seed; "
            f"{args.gigabits:g} Gbit/s between nodes. All SAEs of a layer are one stack on one activation store: "
            "a token is harvested and read once for all of them. Layers are tasks of their own: with as many "
            "GPUs as layers the time is that of one layer. What does not fit into a GPU's memory is divided into "
            "passes (`src/husai/training/memory.py`), each of which reads the store again. Left out: that ReLU, "
            "JumpReLU and gated SAEs multiply densely three times where TopK does once, AuxK, CE-Bench, and the "
            "checkpoints (an SAE and eight decoders over training each).",
            WIDTH,
        ),
        "",
        "The bottleneck is the largest of training, harvest, sending the store, and probing on 16 cores.",
        "",
        "## Without a store",
        "",
        *streams(memory),
    ]
    return "\n".join(lines) + "\n"


def streams(memory: dict) -> list[str]:
    """Text on the cost of a stream instead of a store.

    Args:
        memory: content of docs/benchmarks/streaming_memory.json.
    """
    sources = memory["sources"]
    peaks = [source["peak_mb"] for source in sources]
    sizes = ", ".join(f"{BUFFER * s.d_in * BYTES * s.layers / 1e9:.1f} GB ({s.name})" for s in STUDIES)
    paragraph = (
        "`train_husai_sae_on_cached_activations.py --model-name` trains on a stream: no activation store is written "
        "or sent. Rows pass a buffer of `--buffer-rows` rows a hook, in memory or on disk. At "
        f"{BUFFER:,} rows in bfloat16 it takes {sizes}. The price is the harvest, again for each "
        "training: the column above, once. All SAEs of all hooks that one command names share it. What "
        "is read more than once (stability, prototypes, Gaussian rows, held-out figures) remains a "
        f"store, of as many rows as it needs. On husai-tiny, {memory['rows_trained']:,} rows through a "
        f"buffer of {memory['buffer_rows']:,} had a peak of {min(peaks):,.0f} to {max(peaks):,.0f} MB, on "
        f"sources of {sources[0]['megabytes'] / 1e3:.0f} to {sources[-1]['megabytes'] / 1e3:.0f} GB of text "
        "([streaming_memory](benchmarks/streaming_memory.md)). Sixteen bytes a document, for repeated "
        "documents, are all that grows with the source."
    )
    return [textwrap.fill(paragraph, WIDTH)]


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--gpu", choices=sorted(GPUS), default="H100", help="default: %(default)s")
    p.add_argument("--utilisation", type=fraction, default=0.4, help="share of the peak (default: %(default)s)")
    p.add_argument(
        "--gigabits", type=positive_float, default=10.0, help="gigabits a second between nodes (default: %(default)s)"
    )
    p.add_argument("--benchmarks", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    p.add_argument("--output", type=Path, default=Path("docs/scaling.md"), help="default: %(default)s")
    args = p.parse_args()
    args.peak = GPUS[args.gpu]
    speed, evals = (read_json(args.benchmarks / f"{n}_speed.json", "benchmark") for n in ("training", "eval"))
    memory = read_json(args.benchmarks / "streaming_memory.json", "benchmark")
    write_text(args.output, text := document(speed, evals, memory, args))
    print(text)


if __name__ == "__main__":
    run_main(main)
