"""Evaluate a language model: bits per byte compared with n-grams, and logistic probes on its residual stream.

    python scripts/analysis/evaluate_language_model.py
    python scripts/analysis/evaluate_language_model.py --model-name results/subjects/husai-tiny --no-control
    python scripts/analysis/evaluate_language_model.py --model-name pythia-70m-deduped \\
      --hook-name blocks.3.hook_resid_pre

Bits per byte are measured on documents held out of husai-tiny's training, and compared with Witten-Bell n-grams of the
subject's own tokenizer. sae-probes' own code fits a probe on each binary data set of the probe side, on the last token
of each prompt. The same probes are fitted on the random-weights model. Exit code 1 if the criteria of docs/methods.md
are missed.
"""

from pathlib import Path

from husai.evals.flags import EvalParser
from husai.runs.cli import name_list, prepare, run_main


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/language_model")
    p.add_model_name(help="name or folder (default: %(default)s)")
    p.add_argument(
        "--hook-name",
        type=name_list,
        default="blocks.1.hook_resid_pre,blocks.2.hook_resid_pre,blocks.3.hook_resid_pre",
        help="hooks to probe; the first is the one whose intervals count (default: %(default)s)",
    )
    p.add_argument("--data-sets", type=name_list, help="default: the binary sets of the probe side")
    p.add_argument("--no-control", action="store_true", help="do not probe the random-weights model")
    p.add_argument("--random-seed", type=int, default=0, help="seed of the random-weights model (default: %(default)s)")
    return p.parse_args()


def main() -> None:
    args = parse()
    from husai.runs.phase import run_phase

    run_phase(args, "language_model", compute, summary, check=check)


def check(results: dict) -> None:
    from husai.runs.errors import CheckFailed

    missed = [b for b in results["bars"] if not b["holds"]]
    if missed:
        raise CheckFailed("; ".join(f"{b['value']:.4f} bits per byte is not {b['bar']}" for b in missed))


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Bits per byte, then probes; returns the results and the figures."""
    device = prepare(args.device, args.threads)
    from husai.activations.language_model import check_hooks
    from husai.subjects import pretrained, text

    digest = pretrained.digest_of(args.subject)
    check_hooks(pretrained.load(args.subject), args.hook_name)
    results = {"phase": "language_model", "subject": args.subject, "subject_digest": digest}
    results["inputs"] = {"subject": digest}
    results |= bits(args, cells, device)
    data_sets = text.expand(args.data_sets) if args.data_sets else text.probe_sets()
    results["probes"] = probes(args, cells, device, data_sets, None)
    results["control"] = None if args.no_control else probes(args, cells, device, data_sets, args.random_seed)
    results["counts"] = {hook: count(results, hook) for hook in args.hook_name}
    return results, draw(results, args.output_dir / "figures")


def bits(args, cells, device) -> dict:
    """{"bits_per_byte", "bars", "history": history of its training, or None if the folder has none}."""
    import numpy as np

    from husai.runs.code import code_version
    from husai.runs.files import read_json
    from husai.subjects import pretrained, text, tiny_lm

    folder = pretrained.open_folder(args.subject)
    corpus = text.corpus()

    def measure() -> tuple[dict, list[Path]]:
        model, tokenizer, _, _ = pretrained.load_transformers(args.subject)
        end = tokenizer.eos_token_id

        def tokenise(texts: list[str]) -> list[np.ndarray]:
            rows = []
            for first in range(0, len(texts), 1000):  # lists of Python numbers are large
                encoded = tokenizer(texts[first : first + 1000], add_special_tokens=False)["input_ids"]
                rows += [np.array([*ids, end], np.int32) for ids in encoded]
            return rows

        c = model.config
        n_ctx = pretrained.context_of(c, args.subject)
        figures = tiny_lm.bits_per_byte(model.to(device), tokenise, corpus, c.vocab_size, n_ctx, end)
        return figures, []

    code = code_version(tiny_lm.bits_per_byte)
    key = {"subject": pretrained.digest_of(args.subject), "text": corpus.digest, "code": code, "threads": args.threads}
    figures = cells.get("bits_per_byte", key, measure)
    log = folder / tiny_lm.LOG
    history = read_json(log, "language model")["history"] if log.exists() else None
    return {"bits_per_byte": figures, "bars": tiny_lm.bars(figures), "history": history}


def probes(args, cells, device, data_sets: list[str], random_seed: int | None) -> dict[str, list[dict]]:
    """{hook: one record for each data set}. Each record is a cell."""
    from husai.activations.language_model import harvest_prompts
    from husai.activations.probes import probe
    from husai.runs.code import code_version
    from husai.runs.progress import progress
    from husai.subjects import pretrained

    subject = pretrained.load(args.subject, random_seed, device)
    folder = harvest_prompts(
        subject, args.hook_name, data_sets, args.artifact_root / "probe_activations" / subject.digest[:16], args.force
    )
    records: dict[str, list[dict]] = {hook: [] for hook in args.hook_name}
    with progress(f"probes on {subject.name}", len(data_sets) * len(args.hook_name)) as advance:
        for hook in args.hook_name:
            for name in data_sets:
                key = {"subject": subject.digest, "hook_name": hook, "data_set": name, "threads": args.threads}
                key["code"] = code_version(harvest_prompts, probe)
                file = folder / f"{name}_{hook}.pt"
                records[hook].append(cells.get("probe", key, lambda f=file, n=name: (probe(f, n), [])))
                advance(1)
    return records


def count(results: dict, hook: str) -> dict:
    """Numbers of data sets whose probes are above chance, and above those of the random-weights model."""
    import numpy as np

    aucs = [r["auc"] for r in results["probes"][hook]]
    answer = {
        "data_sets": len(aucs),
        "above_chance": sum(a["low"] > 0.5 for a in aucs),
        "mean_auc": float(np.mean([a["estimate"] for a in aucs])),
    }
    if results["control"]:
        control = [r["auc"]["estimate"] for r in results["control"][hook]]
        answer["control_mean_auc"] = float(np.mean(control))
        answer["above_control"] = sum(a["estimate"] > c for a, c in zip(aucs, control, strict=True))
    return answer


def draw(results: dict, folder: Path) -> list[Path]:
    from husai.report import language_model

    paths = [language_model.bits_per_byte(results["bits_per_byte"], folder / "bits_per_byte.png")]
    paths.append(language_model.probes(results, folder / "probes.png"))
    if results["history"]:
        paths.append(language_model.loss(results["history"], folder / "loss.png"))
    return paths


def summary(results: dict) -> str:
    figures, hooks = results["bits_per_byte"], list(results["probes"])
    lines = [
        f"# {results['subject']}: bits per byte and probes",
        "",
        f"Bits per byte on {figures['documents']} held-out documents ({figures['bytes']:,} bytes, "
        f"{figures['tokens']:,} tokens):",
        "",
        "| family | model | trigram | bigram | unigram |",
        "|---|---|---|---|---|",
    ]
    for name, row in [("all", figures["all"]), *figures["families"].items()]:
        values = " | ".join(f"{row[m]:.4f}" for m in ("model", "trigram", "bigram", "unigram"))
        lines.append(f"| {name} | {values} |")
    lines.append("")
    for b in results["bars"]:
        relation, word = ("<", "holds") if b["holds"] else ("≥", "missed")
        lines.append(f"- {b['bar']}: {b['value']:.4f} {relation} {b['below']:.4f}, {word}")
    lines += [
        "",
        "Logistic probes on the last token of each prompt (sae-probes' split and fit; DeLong intervals, 95 %):",
        "",
        "| hook | data sets | AUC above chance (lower bound > 0.5) | mean AUC | random weights: mean AUC | above it |",
        "|---|---|---|---|---|---|",
    ]
    for hook, c in results["counts"].items():
        control = f"{c['control_mean_auc']:.4f} | {c['above_control']}" if results["control"] else "not computed | "
        lines.append(f"| {hook} | {c['data_sets']} | {c['above_chance']} | {c['mean_auc']:.4f} | {control} |")
    lines += [
        "",
        "| data set | test prompts | " + " | ".join(f"{h}" for h in hooks) + " | random weights, first hook |",
    ]
    lines.append("|---|---|" + "---|" * (len(hooks) + 1))
    for i, first in enumerate(results["probes"][hooks[0]]):
        cells = [interval(results["probes"][h][i]["auc"]) for h in hooks]
        cells.append(interval(results["control"][hooks[0]][i]["auc"]) if results["control"] else "")
        n = first["auc"]["n_positive"] + first["auc"]["n_negative"]
        lines.append(f"| {first['data_set']} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def interval(e: dict) -> str:
    return f"{e['estimate']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"


if __name__ == "__main__":
    run_main(main)
