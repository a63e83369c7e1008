"""Measure the training speed of TopK SAEs: HUSAI's engine against other libraries, on the same activations.

    pip install --no-deps -r requirements-bench.txt
    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --device cuda --saes 16 --widths 2048,16384 --output-dir docs/benchmarks/gpu

Every contender takes whole training steps (loss with AuxK, gradients, Adam, decoder rows of norm 1, count of dead
features) for n SAEs that differ in their seed. It runs in a separate process, so that each library runs as its users
run it. A round measures every contender once. Ratios are computed within a round, and medians over rounds are reported.
Figures are rows x SAEs per second.
"""

import os
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from husai.report.figures import save_lines
from husai.runs.cli import Parser, int_list, positive_int, prepare, run_main
from husai.runs.errors import BadInput
from husai.runs.files import write_json, write_text
from husai.runs.machine import cpu_model
from husai.runs.progress import progress

Step = Callable  # takes one training step of all SAEs on a batch `[rows, d_in]`
DEAD_SHARE = 0.1  # share of dead features in the rounds with AuxK
LONG_AGO = 10**9  # rows or steps since a dead feature fired
FAINT = 0.05  # scale of a dead feature's encoder weights, it is positive half of the time, never among the largest


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: functions that return a function that takes one step of n SAEs on a batch `[rows, d_in]`


def husai(n: int, d_in: int, d_sae: int, k: int, dead: int, device: str, propose: bool) -> Step:
    import torch

    from husai.dictionaries.family import Shape
    from husai.training.stack import Member, Stack, StepSettings

    members = [Member(seed, d_sae, k, 3e-4, 0) for seed in range(n)]
    stack = Stack(members, Shape(d_in, d_in, d_sae), torch.device(device), torch.float32)
    stack.params["W_enc"].data[:, :, :dead] *= FAINT
    settings = StepSettings((0.9, 0.999), 0.0, 1 / 32, LONG_AGO - 1, propose)
    steps = iter(range(10**9))

    def step(x) -> None:
        stack.silent[:, :dead] = LONG_AGO
        batch = x.expand(n, -1, -1)
        stack.step(batch, batch, next(steps), 1.0, settings)

    return step


def husai_exact(*sizes) -> Step:
    return husai(*sizes, propose=False)


def husai_proposed(*sizes) -> Step:
    return husai(*sizes, propose=True)


def dictionary_learning(n: int, d_in: int, d_sae: int, k: int, dead: int, device: str) -> Step:
    from dictionary_learning.trainers.top_k import TopKTrainer

    sizes = {"steps": 10**6, "activation_dim": d_in, "dict_size": d_sae, "k": k, "layer": 0, "lm_name": ""}
    trainers = [TopKTrainer(**sizes, lr=3e-4, device=device, seed=seed) for seed in range(n)]
    for trainer in trainers:
        trainer.ae.encoder.weight.data[:dead] *= FAINT

    def step(x) -> None:
        for trainer in trainers:
            trainer.num_tokens_since_fired[:dead] = LONG_AGO
            trainer.update(1, x)

    return step


def sae_lens(n: int, d_in: int, d_sae: int, k: int, dead: int, device: str) -> Step:
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    trainers = []
    for seed in range(n):
        torch.manual_seed(seed)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=device))
        sae.W_enc.data[:, :dead] *= FAINT
        config = SAETrainerConfig(10**12, 4096, lr=3e-4, lr_end=3e-5, device=device)
        trainers.append(SAETrainer(config, sae, iter(())))

    def step(x) -> None:
        for trainer in trainers:
            trainer.n_forward_passes_since_fired[:dead] = LONG_AGO
            trainer.step(x)
            trainer.n_training_steps += 1

    return step


def sparsify(n: int, d_in: int, d_sae: int, k: int, dead: int, device: str) -> Step:
    """sparsify: its SparseCoder, with the steps of its Trainer, which itself needs a language model."""
    import torch

    if device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # sparsify does so itself without a GPU, but not at import
    from sparsify import SparseCoder, SparseCoderConfig

    coders = []
    for seed in range(n):
        torch.manual_seed(seed)
        coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device)
        coder.encoder.weight.data[:dead] *= FAINT
        since = torch.zeros(d_sae, dtype=torch.long, device=device)
        coders.append((coder, torch.optim.Adam(coder.parameters(), lr=3e-4), since))

    def step(x) -> None:
        for coder, optimiser, since in coders:
            since[:dead] = LONG_AGO
            coder.set_decoder_norm_to_unit_norm()
            out = coder(x, dead_mask=since > 10_000_000)
            (out.fvu + out.auxk_loss / 32).backward()
            coder.remove_gradient_parallel_to_decoder_directions()
            optimiser.step()
            optimiser.zero_grad()
            fired = torch.zeros(d_sae, dtype=torch.bool, device=device)
            fired[out.latent_indices.flatten()] = True
            since += len(x)
            since[fired] = 0

    return step


CONTENDERS = {
    "HUSAI, float32 product": husai_exact,
    "HUSAI, bfloat16 proposals": husai_proposed,
    "dictionary_learning": dictionary_learning,
    "SAELens": sae_lens,
    "sparsify": sparsify,
}
OURS = [name for name in CONTENDERS if name.startswith("HUSAI")]
PRODUCT = "the encoder's dense float32 product alone"
PARTS = {
    "select": "product and choice",
    "residual": "decoding",
    "weighted_sums": "weight gradients",
    "activity": "activity",
    "adam": "Adam",
}
"""Function of a backend -> its name in the report."""


# ---------------------------------------------------------------------------------------------------------------------
# The process of one contender


def work(name: str, sizes: tuple, args, pipe: Connection) -> None:
    """Make the contender and its batches, then take as many steps as asked and answer with the seconds they took."""
    if name not in OURS and not args.huge_pages:
        os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # removes HUSAI's setting before torch allocates memory
    import torch

    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    data = batches(args.d_in, args.batch_size, device)
    if name == PRODUCT:
        W = torch.randn(sizes[2], args.d_in, device=device)

        def step(x) -> None:
            torch.mm(x, W.T)
    else:
        step = CONTENDERS[name](*sizes, args.device)
    step(data[0])  # compile, allocate
    pipe.send(0)
    taken = 0
    while (steps := pipe.recv()) != "parts":
        chosen = [data[(taken + s) % len(data)] for s in range(steps)]
        taken += steps
        pipe.send(timed(lambda chosen=chosen: [step(x) for x in chosen], device))
    pipe.send(shares(step, data, device) if name in OURS else {})


def shares(step: Step, data: list, device) -> dict[str, float]:
    """Shares of the parts in the time of HUSAI's step. The rest is that of autograd and PyTorch."""
    from husai.kernels.sparse import backend

    spent, module = dict.fromkeys(PARTS, 0.0), backend(device.type)
    for name in PARTS:
        part = getattr(module, name)

        def watched(*arguments, name=name, part=part):
            out = []
            spent[name] += timed(lambda: out.append(part(*arguments)), device)
            return out[0]

        setattr(module, name, watched)
    total = timed(lambda: [step(x) for x in data], device)
    shares_of_parts = {PARTS[name]: seconds / total for name, seconds in spent.items()}
    return shares_of_parts | {"rest": 1 - sum(shares_of_parts.values())}


def timed(work: Callable[[], object], device) -> float:
    """Seconds of a call."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def batches(d_in: int, rows: int, device) -> list:
    """Four batches of sparse mixtures of 2,000 directions with noise: codes like those of activations."""
    import torch

    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2000, d_in, generator=g), dim=1)
    made = []
    for _ in range(4):
        chosen = torch.randint(2000, (rows, 32), generator=g)
        x = torch.einsum("rk,rkd->rd", torch.rand(rows, 32, generator=g), directions[chosen])
        x = x + 0.1 * torch.randn(rows, d_in, generator=g) / d_in**0.5
        made.append(((x - x.mean(0)) * (d_in / (x - x.mean(0)).square().sum(1).mean()).sqrt()).to(device))
    return made


def measure(args, n: int, d_sae: int, dead: int, advance: Callable) -> tuple[dict, dict]:
    """Speeds of all contenders, one value a round, and shares of the parts of HUSAI's step. Speeds are rows x SAEs per
    second, for the dense product rows per second."""
    sizes = (n, args.d_in, d_sae, args.k, dead)
    pipes, processes = {}, []
    for name in [*args.contenders, PRODUCT]:
        pipes[name], child_end = get_context("spawn").Pipe()
        processes.append(get_context("spawn").Process(target=work, args=(name, sizes, args, child_end)))
        processes[-1].start()
        child_end.close()
    try:
        for pipe in pipes.values():
            pipe.recv()
        speeds = {name: [] for name in pipes}
        for _ in range(args.rounds):
            for name, pipe in pipes.items():
                steps = 1 if name in CONTENDERS and name not in OURS else 4  # similar times for all contenders
                pipe.send(steps)
                speeds[name].append(steps * (1 if name == PRODUCT else n) * args.batch_size / pipe.recv())
                advance(1)
        parts = {}
        for name, pipe in pipes.items():
            pipe.send("parts")
            parts[name] = pipe.recv()
    except EOFError:
        raise BadInput("a contender's process ended; the lines above say why") from None
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return speeds, {name: p for name, p in parts.items() if p}


# ---------------------------------------------------------------------------------------------------------------------


def row(label: str, speeds: dict, parts: dict) -> dict:
    peers = [name for name in speeds if name in CONTENDERS and name not in OURS]
    best = [max(values) for values in zip(*(speeds[p] for p in peers), strict=True)]
    ratios = {o: [a / b for a, b in zip(speeds[o], best, strict=True)] for o in OURS if o in speeds}
    return {
        "label": label,
        "rates": speeds,
        "parts": parts,
        "medians": {name: median(values) for name, values in speeds.items()},
        "ratios": {name: {"median": median(r), "lowest": min(r), "highest": max(r)} for name, r in ratios.items()},
    }


def device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def markdown(result: dict, command: str) -> str:
    names = [name for name in CONTENDERS if name in result["rows"][0]["medians"]]
    machine = result["machine"]
    lines = [
        "# Training speed",
        "",
        f"`{command}`: d_in {result['d_in']}, k {result['k']}, batches of {result['batch_size']} rows, "
        f"{result['rounds']} rounds; {machine['device']}, {machine['threads']} threads; "
        + ", ".join(f"{name} {v}" for name, v in result["versions"].items())
        + ". Rows × SAEs trained a second, medians over the rounds. Ratios: to the fastest peer of the same round, "
        "median (lowest to highest). Last column: the encoder's dense float32 product alone, which no exact step can "
        "do without, and the share of that rate that HUSAI's whole step reaches with it.",
        "",
        "| | " + " | ".join(names) + " | " + " | ".join(f"ratio, {o.removeprefix('HUSAI, ')}" for o in OURS)
        + " | product |",
        "|---" * (len(names) + len(OURS) + 2) + "|",
    ]  # fmt: skip
    for r in result["rows"]:
        cells = [f"{r['medians'][name]:,.0f}" for name in names]
        cells += [f"**{q['median']:.1f}** ({q['lowest']:.1f} to {q['highest']:.1f})" for q in r["ratios"].values()]
        product, reached = r["medians"][PRODUCT], r["medians"].get(OURS[0])
        cells.append(f"{product:,.0f}" + (f" ({reached / product:.0%})" if reached else ""))
        lines.append(f"| {r['label']} | " + " | ".join(cells) + " |")
    lines += ["", "Where the time of a step of HUSAI's goes:", ""]
    lines += ["| | " + " | ".join([*PARTS.values(), "rest"]) + " |", "|---" * (len(PARTS) + 2) + "|"]
    for r in result["rows"]:
        for name, parts in r["parts"].items():
            cells = " | ".join(f"{share:.0%}" for share in parts.values())
            lines.append(f"| {r['label']}, {name.removeprefix('HUSAI, ')} | {cells} |")
    lines += [
        "",
        "*float32 product*: the dense product and everything else in float32. *bfloat16 proposals*: a bfloat16 product "
        "proposes which pre-activations can be among the k largest, with a proven bound of its error, and those are "
        "computed again in float32: the same codes as with the float32 product (`docs/methods.md`). All peers run in "
        "float32. *AuxK at work*: a tenth of the features counts as dead in every step, for every contender.",
        "",
        "![rows x SAEs a second](training_speed.png)",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    p = Parser(__doc__)
    p.add_machine()
    p.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    p.add_argument("--saes", type=int_list, default="1,2,5,10", help="at the first width (default: %(default)s)")
    p.add_argument("--widths", type=int_list, default="1024,4096,16384", help="d_sae (default: %(default)s)")
    p.add_argument("--wide-saes", type=positive_int, default=2, help="SAEs at the other widths (default: %(default)s)")
    p.add_argument("--d-in", type=positive_int, default=512, help="default: %(default)s")
    p.add_argument("--k", type=positive_int, default=32, help="default: %(default)s")
    p.add_argument("--batch-size", type=positive_int, default=4096, help="rows (default: %(default)s)")
    p.add_argument("--rounds", type=positive_int, default=5, help="default: %(default)s")
    p.add_argument("--huge-pages", action="store_true", help="give the peers HUSAI's setting of torch's memory too")
    p.add_argument("--contenders", default=",".join(["husai", "peers"]), help="husai,peers or one of them")
    args = p.parse_args()
    device = prepare(args.device, args.threads)
    contenders = set(args.contenders.split(","))
    if not contenders <= {"husai", "peers"}:
        raise BadInput(f"--contenders {args.contenders}: husai, peers or both expected")
    args.contenders = [c for c in CONTENDERS if ("husai" if c in OURS else "peers") in contenders]

    first, *wider = args.widths
    settings = [(n, first, 0) for n in args.saes] + [(args.wide_saes, w, 0) for w in wider]
    settings.append((max(n for n in args.saes if n <= 5), first, int(DEAD_SHARE * first)))
    rows = []
    with progress("measuring", len(settings) * args.rounds * (len(args.contenders) + 1)) as advance:
        for n, d_sae, dead in settings:
            label = f"{n} SAE{'s' * (n > 1)}, d_sae {d_sae:,}" + (", AuxK at work" if dead else "")
            rows.append(row(label, *measure(args, n, d_sae, dead, advance)))
    result = {
        "d_in": args.d_in,
        "k": args.k,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "machine": {
            "device": device_name(device),
            "threads": args.threads,
        },
        "versions": {name: version(name) for name in ("torch", "sae-lens", "dictionary-learning", "eai-sparsify")},
        "rows": rows,
    }
    write_json(args.output_dir / "training_speed.json", result)
    command = "python benchmarks/training_speed.py" + (" --huge-pages" if args.huge_pages else "")
    write_text(args.output_dir / "training_speed.md", text := markdown(result, command))
    by_saes, by_width = rows[: len(args.saes)], [rows[len(args.saes) - 1], *rows[len(args.saes) : -1]]
    save_lines(
        args.output_dir / "training_speed.png",
        [
            ("SAEs in the stack", args.saes, {c: [r["medians"][c] for r in by_saes] for c in args.contenders}),
            ("d_sae", args.widths, {c: [r["medians"][c] for r in by_width] for c in args.contenders}),
        ],
        "rows × SAEs a second",
    )
    print(text)


if __name__ == "__main__":
    run_main(main)
