"""Compare exact probes with sae-probes' own code, in figures and in speed.

    python benchmarks/probing.py
    python benchmarks/probing.py --dataset-names 96_spam_is,92_glue_sst2 --seeds 42

Both probe TopK and ReLU SAEs of husai-tiny (the embedded default) on every data set and k. The rule was fixed before
the first run (docs/methods.md): the 99th percentile of |difference of test AUC|, over SAEs, data sets and k, is at most
0.002. Exit code 1 if it does not hold.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

from husai.runs.cli import Parser, int_list, name_list, positive_int, prepare, run_main, seed_list
from husai.runs.errors import CheckFailed
from husai.runs.files import write_json, write_text
from husai.runs.machine import cpu_model

HOOK = "blocks.1.hook_resid_pre"
TIMED = (
    "5_hist_fig_ismale,21_headline_istrump,36_sciq_tf,50_deon_isvalid,92_glue_sst2,96_spam_is,106_hate_hate,"
    "157_amazon_5star"
)
PERCENTILE, TOLERANCE = 99, 0.002
QUANTILES = (50, 90, 99, 100)


def main() -> None:
    p = Parser(__doc__)
    p.add_shared()
    p.add_argument("--dataset-names", type=name_list, default="probe", help="names or sides (default: %(default)s)")
    p.add_argument("--ks", type=int_list, default="1,2,5,16", help="features of a probe (default: %(default)s)")
    p.add_argument("--seeds", type=seed_list, default="42,123", help="SAEs of each family (default: %(default)s)")
    p.add_argument("--timed", type=name_list, default=TIMED, help="data sets that are timed (default: %(default)s)")
    p.add_argument("--rounds", type=positive_int, default=2, help="rounds of timing, by turns (default: %(default)s)")
    p.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    args = p.parse_args()
    device = prepare(args.device, args.threads)
    from husai.activations.language_model import harvest_prompts
    from husai.dictionaries.checkpoints import checkpoint_digest
    from husai.evals import loaded, sae_probes
    from husai.subjects import pretrained

    sets = sae_probes.check_data_sets(args.dataset_names)
    subject = pretrained.load("husai-tiny", device=device)
    output = args.artifact_root / "experiments" / "probing"
    trained = loaded.train_default(output, args.artifact_root, subject.name, HOOK, device, args.threads, args.force)
    saes = sorted(f for f in trained.iterdir() if f.name.endswith(tuple(f"seed{s}" for s in args.seeds)))
    places = loaded.Places(output, args.artifact_root, args.device, args.threads)
    cache = places.probe_activations(subject)
    harvest_prompts(subject, [HOOK], [*dict.fromkeys([*sets, *args.timed])], cache)

    def probed(name: str, names: list[str], root: Path, ks: tuple) -> list:
        settings = sae_probes.Settings(subject.digest, subject.name, HOOK, tuple(names), ks, probing=name)
        paths = {"cache": str(cache), "root": str(root), "device": args.device}
        tasks = [sae_probes.ProbeTask(s.name, "sae", str(s), checkpoint_digest(s), 42, settings, **paths) for s in saes]
        return sae_probes.run(tasks, args.threads, root)

    figures = {}
    for name in sae_probes.PROBINGS:
        figures_of_saes = probed(name, sets, args.artifact_root / "probes", tuple(args.ks))
        figures[name] = {s.name: f for s, f in zip(saes, figures_of_saes, strict=True)}
    seconds = {name: [] for name in sae_probes.PROBINGS}
    for _ in range(args.rounds):
        for name, times in seconds.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                probed(name, args.timed, Path(folder), (1, 5, 16))
                times.append(time.perf_counter() - began)
    result = compared(figures, sets) | {"seconds": seconds}
    pairs = zip(seconds["sae_probes"], seconds["sae_probes_exact"], strict=True)
    result["ratio"] = median(official / exact for official, exact in pairs)
    result |= {"timed": args.timed, "cpu": cpu_model(), "threads": args.threads}
    result["versions"] = sae_probes.versions(sae_probes.EXACT)
    write_json(args.output_dir / "probing.json", result)
    write_text(args.output_dir / "probing.md", text := markdown(result))
    print(text)
    if not result["holds"]:
        raise CheckFailed(f"the {PERCENTILE}th percentile is {result['all']['quantiles'][f'{PERCENTILE}']:.4f}")


def compared(figures: dict, sets: list[str]) -> dict:
    """Quantiles of |exact − official| of the test AUC, for each k and over all k."""
    import numpy as np

    official, exact = (figures[name] for name in ("sae_probes", "sae_probes_exact"))
    ks = list(next(iter(official.values())))
    change = {  # [SAEs, data sets]
        k: np.array([np.subtract(exact[s][k]["test_auc"], official[s][k]["test_auc"]) for s in official]) for k in ks
    }

    def row(d) -> dict:
        size = np.abs(d)
        quantiles = {str(q): float(np.percentile(size, q)) for q in QUANTILES}
        return {"n": d.size, "mean_change": float(d.mean()), "quantiles": quantiles}

    every = np.concatenate([d.ravel() for d in change.values()])
    k, (sae, data_set) = max(
        ((k, np.unravel_index(np.abs(d).argmax(), d.shape)) for k, d in change.items()),
        key=lambda at: abs(change[at[0]][at[1]]),
    )
    label = list(official)[sae]
    worst = {"sae": label, "data_set": sets[data_set], "k": k}
    worst |= {name: figures[name][label][k]["test_auc"][data_set] for name in figures}
    means = {  # differences of an SAE's mean over data sets, which a study reports
        k: float(np.abs(d.mean(1)).max()) for k, d in change.items()
    }
    quantiles_by_k = {"data_sets": len(sets), "saes": list(official), "by_k": {k: row(d) for k, d in change.items()}}
    quantiles_by_k |= {"all": row(every), "largest": worst, "largest_change_of_a_mean": means}
    return quantiles_by_k | {"holds": quantiles_by_k["all"]["quantiles"][str(PERCENTILE)] <= TOLERANCE}


def markdown(r: dict) -> str:
    lines = [
        "# Exact probes beside sae-probes' own code",
        "",
        f"`python benchmarks/probing.py`: {len(r['saes'])} SAEs of husai-tiny ({', '.join(r['saes'])}), "
        f"{r['data_sets']} data sets, test AUC, {r['cpu']}.",
        "",
        f"Rule: the {PERCENTILE}th percentile of |difference| over SAEs, data sets and k is at most {TOLERANCE}. "
        f"**{'It holds' if r['holds'] else 'It does not hold'}.**",
        "",
        "| k | figures | mean change | median | 90 % | 99 % | largest | largest change of an SAE's mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k, row in [*r["by_k"].items(), ("all", r["all"])]:
        of_mean = r["largest_change_of_a_mean"].get(k)
        cells = [k, str(row["n"]), f"{row['mean_change']:+.5f}", *(f"{v:.5f}" for v in row["quantiles"].values())]
        lines.append(f"| {' | '.join([*cells, '' if of_mean is None else f'{of_mean:.5f}'])} |")
    w, s = r["largest"], r["seconds"]
    if "16" in r["by_k"]:
        lines += [
            "",
            "At k = 1 all fits order the rows alike, therefore the two agree there by construction. At k = 16 the saga "
            "of the official code is furthest from its optimum. The rule of the gate reads k = 5.",
        ]
    lines += [
        "",
        f"The largest difference: {w['sae']}, {w['data_set']}, k = {w['k']}: {w['sae_probes']:.4f} by sae-probes, "
        f"{w['sae_probes_exact']:.4f} exact.",
        "",
        f"Time of the {len(r['timed'])} data sets of the demo, {len(r['saes'])} SAEs, k = 1, 5, 16, {r['threads']} "
        f"cores, medians of {len(s['sae_probes'])} rounds: {median(s['sae_probes']):.1f} s by sae-probes, a process a "
        f"core with its imports, {median(s['sae_probes_exact']):.1f} s exact in one process: **{r['ratio']:.1f} "
        "times** as fast.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
