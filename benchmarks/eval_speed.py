"""Measure the speed of the external benchmarks on husai-tiny: HUSAI's code against the libraries' own loops.

    python benchmarks/eval_speed.py
    python benchmarks/eval_speed.py --rounds 3 --saes 1,8

Both sides of a comparison read the same inputs, and run one after the other in every round. Ratios are computed within
a round, and medians over rounds are reported.

- prompts: the harvest of sae-probes' activations, against sae-probes' own function;
- contrastive: CE-Bench's scores, against its own loop (each story through the whole model, for each SAE). The scores
  must agree;
- core: CE and KL of n SAEs, against SAEBench's function for each SAE;
- probing: SAEBench's probing of several SAEs by HUSAI's workers, against its own loop in one process.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

from husai.runs.cli import Parser, int_list, positive_int, prepare, run_main
from husai.runs.files import write_json, write_text
from husai.runs.machine import cpu_model

HOOK = "blocks.1.hook_resid_pre"
SETS = ["96_spam_is", "92_glue_sst2", "157_amazon_5star"]
D_SAE, K = 1024, 16


def main() -> None:
    p = Parser(__doc__)
    p.add_machine()
    p.add_argument("--saes", type=int_list, default="1,8", help="numbers of SAEs (default: %(default)s)")
    p.add_argument("--pairs", type=positive_int, default=40, help="story pairs (default: %(default)s)")
    p.add_argument("--rounds", type=positive_int, default=3, help="default: %(default)s")
    p.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"), help="default: %(default)s")
    args = p.parse_args()
    prepare(args.device, args.threads)
    from husai.subjects import pretrained

    subject = pretrained.load("husai-tiny", device=args.device)
    saes = [random_sae(subject, seed) for seed in range(max(args.saes))]
    rows = [prompts(args, subject)]
    for n in args.saes:
        rows += [contrastive(args, subject, saes[:n]), core(args, subject, saes[:n])]
    rows.append(probing(args, subject, saes[: min(4, len(saes))]))
    result = {"cpu": cpu_model(), "threads": args.threads, "rounds": args.rounds, "rows": rows}
    write_json(args.output_dir / "eval_speed.json", result)
    write_text(args.output_dir / "eval_speed.md", text := markdown(result))
    print(text)


def random_sae(subject, seed: int):
    """TopK SAE with random directions. Its speed does not depend on its weights."""
    import torch

    from husai.dictionaries.family import unit_rows
    from husai.dictionaries.sae import SAE
    from husai.runs.seeds import generator

    W = unit_rows(D_SAE, subject.model.cfg.d_model, [generator(seed, "speed")])[0]
    zeros = torch.zeros(D_SAE), torch.zeros(W.shape[1])
    return SAE({"W_enc": W.T.contiguous(), "b_enc": zeros[0], "W_dec": W, "b_dec": zeros[1]}, "topk", K)


def by_turns(args, title: str, unit: str, work: float, husai_side, library_side) -> dict:
    """Times of both sides in every round. Each call gets a fresh folder."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        for name, side in (("ours", husai_side), ("theirs", library_side)):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                side(Path(folder))
                times[name].append(time.perf_counter() - began)
    ratio = median(t / o for o, t in zip(times["ours"], times["theirs"], strict=True))
    seconds = {name: median(seconds_of_rounds) for name, seconds_of_rounds in times.items()}
    return {"what": title, "unit": unit, "work": work, "seconds": seconds, "ratio": ratio, "times": times}


def prompts(args, subject) -> dict:
    from sae_probes.generate_model_activations import ensure_dataset_activations

    from husai.activations.language_model import harvest_prompts
    from husai.subjects import text

    tokens = sum(
        len(ids)
        for name in SETS
        for ids in subject.tokenizer(text.documents(name), truncation=True, max_length=subject.n_ctx)["input_ids"]
    )

    def library_side(folder: Path) -> None:
        ensure_dataset_activations(
            subject.name, SETS, [HOOK], folder, args.device, max_seq_len=subject.n_ctx, model=subject.model
        )

    title = f"prompts of {len(SETS)} data sets"
    return by_turns(
        args, title, "tokens", tokens, lambda folder: harvest_prompts(subject, [HOOK], SETS, folder), library_side
    )


def contrastive(args, subject, saes) -> dict:
    import numpy as np
    import torch

    from husai.evals import contrastive

    pairs = contrastive.local_pairs(SETS, args.pairs, 0).rows
    stories = [p["story1"] for p in pairs] + [p["story2"] for p in pairs]
    scores_by_side: dict[str, list] = {}

    def husai_side(folder: Path) -> None:
        means, tokens, _ = contrastive.story_means(subject, HOOK, saes, stories, folder)
        scores_by_side["ours"] = [contrastive.scores(m, tokens)["published"]["interpretability"].mean() for m in means]

    @torch.inference_mode()
    def library_side(folder: Path) -> None:
        scores_by_side["theirs"] = []
        for sae in saes:
            features, tokens = [], []
            for story in stories:
                ids = subject.tokenizer(story, truncation=True, max_length=subject.n_ctx)["input_ids"]
                _, cache = subject.model.run_with_cache(torch.tensor([ids]))
                features.append(sae.encode(cache[HOOK][0]).mean(0).numpy())
                tokens.append(len(ids))
            scored = contrastive.scores(np.stack(features), np.array(tokens))
            scores_by_side["theirs"].append(scored["published"]["interpretability"].mean())

    row = by_turns(
        args,
        f"contrastive scores of {len(saes)} SAEs",
        "pairs × SAEs",
        len(pairs) * len(saes),
        husai_side,
        library_side,
    )
    np.testing.assert_allclose(scores_by_side["ours"], scores_by_side["theirs"], rtol=1e-4)
    return row


def core(args, subject, saes) -> dict:
    import torch
    from sae_bench.evals.core.main import get_recons_loss
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import SAE

    from husai.evals.loaded import to_saelens
    from husai.subjects import text
    from husai.training.recovered import cross_entropies

    encoded = {t: subject.tokenizer(t)["input_ids"] for t in text.corpus().heldout[:300]}
    texts = [t for t, ids in encoded.items() if len(ids) >= subject.n_ctx][:16]
    tokens = torch.tensor([encoded[t][: subject.n_ctx] for t in texts])
    opened = []
    with tempfile.TemporaryDirectory() as folder:
        for i, sae in enumerate(saes):
            opened.append(SAE.load_from_disk(to_saelens(sae, subject, HOOK, Path(folder) / str(i))))
            load_and_format_sae("husai", opened[-1], "cpu")

    @torch.no_grad()
    def library_side(folder: Path) -> None:
        for sae in opened:
            for batch in tokens.split(8):
                get_recons_loss(sae, subject.model, batch, None, compute_kl=True, compute_ce_loss=True)

    title = f"CE and KL of {len(saes)} SAEs"
    return by_turns(
        args,
        title,
        "tokens × SAEs",
        tokens.numel() * len(saes),
        lambda _: cross_entropies(subject, HOOK, saes, texts),
        library_side,
    )


def probing(args, subject, saes) -> dict:
    from husai.activations.language_model import harvest_prompts
    from husai.dictionaries.checkpoints import checkpoint_digest
    from husai.evals import sae_probes
    from husai.evals.loaded import to_saelens

    with tempfile.TemporaryDirectory() as shared:
        cache = Path(shared)
        harvest_prompts(subject, [HOOK], SETS, cache)
        settings = sae_probes.Settings(subject.digest, subject.name, HOOK, tuple(SETS), (1, 2, 5, 16))
        paths = [to_saelens(sae, subject, HOOK, cache / f"sae{i}") for i, sae in enumerate(saes)]

        def side(workers: int):
            def run(folder: Path) -> None:
                places = {"cache": str(cache), "root": str(folder), "device": args.device}
                tasks = [
                    sae_probes.ProbeTask(p.name, "sae", str(p), checkpoint_digest(p), 42, settings, **places)
                    for p in paths
                ]
                sae_probes.run(tasks, workers, folder)

            return run

        title = f"probing of {len(saes)} SAEs on {len(SETS)} data sets, {args.threads} workers"
        return by_turns(args, title, "SAEs × data sets", len(saes) * len(SETS), side(args.threads), side(1))


def markdown(result: dict) -> str:
    lines = [
        "# Speed of the external benchmarks",
        "",
        f"`python benchmarks/eval_speed.py`: husai-tiny, {HOOK}, TopK SAEs of {D_SAE:,} features, {result['cpu']}, "
        f"{result['threads']} threads; medians of {result['rounds']} rounds, ratios within a round. Process starts and "
        "imports count where a side has them (probing).",
        "",
        "| what | ours, s | the library's loop, s | ratio | ours, a second |",
        "|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        o, t = r["seconds"]["ours"], r["seconds"]["theirs"]
        lines.append(f"| {r['what']} | {o:.1f} | {t:.1f} | {r['ratio']:.1f} | {r['work'] / o:,.1f} {r['unit']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
