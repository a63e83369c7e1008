"""Phase 4a: test whether features of SAEs with different seeds are more similar than chance.

    python scripts/experiments/run_phase4a_reproduction.py
    python scripts/experiments/run_phase4a_reproduction.py --hook-name blocks.0.mlp.hook_post --d-sae 512 --k 16
    python scripts/experiments/run_phase4a_reproduction.py --protocol published
    python scripts/experiments/run_phase4a_reproduction.py --model-name husai-tiny \\
      --hook-name blocks.1.hook_resid_pre --d-sae 1024 --k 16 --output-dir results/experiments/phase4a_husai_tiny
    python scripts/experiments/run_phase4a_reproduction.py --sae-root MY_SAES --activation-cache-dir STORE

The subject is a transformer that solved modular addition. TopK SAEs are trained on its residual stream at "=" with
several seeds, and every pair is scored against its nulls (docs/methods.md). On this default subject the phase also
makes the gate's positive control: SAEs of planted features, at several degrees of recovery. Neither result applies to
another model. `--model-name` replaces the subject by a language model. Then training rows and held-out rows share no
documents, SAEs of the random-weights model serve as a further null, and the cross-entropy with each SAE spliced in is
measured. `--protocol published` also runs the setting of the earlier study, whose input contained the answer and whose
model was hardly trained. `--sae-root` scores user-supplied checkpoints.
"""

from pathlib import Path
from typing import Any

from husai.evals.flags import EvalParser
from husai.runs.cli import DEFAULT_SEEDS, positive_int, prepare, run_main, seed_list

# Published figures of the earlier study's phase 4a: pwmcc over pairs of trained seeds, and of random dictionaries.
PUBLISHED: dict[str, Any] = {"trained": [0.300, 0.302], "random": 0.2988, "difference": [0.0012, 0.0029]}


def parse():
    p = EvalParser(__doc__)
    p.add_common("results/experiments/phase4a_trained_vs_random")
    p.add_argument("--protocol", choices=["husai", "published"], default="husai", help="default: %(default)s")
    p.add_source("blocks.0.hook_resid_post")
    p.add_argument("--seeds", type=seed_list, default=DEFAULT_SEEDS, help="default: %(default)s")
    p.add_recipe(d_sae=256, tokens=1_000_000, batch_size=1024)
    p.add_argument("--k", type=positive_int, default=8, help="active features a row (default: %(default)s)")
    p.add_core_texts()
    p.add_argument("--sae-root", type=Path, help="score the checkpoints below this folder; train nothing")
    p.add_argument("--untrained-root", type=Path, help="the same checkpoints before training, same folder names")
    p.add_same_model()
    args = p.parse_phase()
    if args.k > args.d_sae:
        p.error(f"--k {args.k}: at most --d-sae {args.d_sae} expected")
    if args.protocol == "published" and (args.sae_root or args.activation_cache_dir):
        p.error("--protocol published trains its own SAEs; it goes with neither --sae-root nor --activation-cache-dir")
    if (args.untrained_root or args.same_model) and not args.sae_root:
        p.error(f"{'--untrained-root' if args.untrained_root else '--same-model'} goes with --sae-root")
    args.declared = p.given(("k", "d_sae")) if args.sae_root else {}
    for flag in p.given(("seeds", "tokens", "batch_size", "learning_rate")).values() if args.sae_root else ():
        p.error(f"{flag}: --sae-root trains nothing; one of both expected")
    return args


def main() -> None:
    args = parse()
    from husai.runs.phase import run_phase

    run_phase(args, "phase4a", compute, summary)


def compute(args, cells) -> tuple[dict, list[Path]]:
    """Harvest activations, train SAEs, and score them; returns the results and the files that they depend on."""
    device = prepare(args.device, args.threads)
    from husai.evidence.planted import inputs
    from husai.evidence.schemas import Phase4a, Phase4aSection
    from husai.report import figures
    from husai.stability import study

    main_section = (
        supplied(args, cells, device) if args.sae_root else trained(args, cells, device, default_protocol(args))
    )
    sections = {"husai": main_section}
    if args.protocol == "published":
        sections["published"] = trained(args, cells, device, published(args))
    control = planted(args, cells, device) if is_default_subject(args) else None
    values = {"phase": "4a", "inputs": inputs(main_section, control), **sections, "published_figures": PUBLISHED}
    results = Phase4a.model_validate(values if control is None else values | {"planted": control})
    files = [path for name, section in sections.items() for path in draw(section, name, args.output_dir)]
    if control is not None:
        files.append(figures.sensitivity(control.sensitivity, args.output_dir / "figures" / "sensitivity.png"))
        folders = [m.checkpoint for degree in control.degrees for m in degree.study.members]
        files += study.checkpoint_files(cells, folders)
    for section in sections.values():
        if isinstance(section, Phase4aSection):
            folders = [m.checkpoint for m in section.members]
            folders += [m.checkpoint for m in section.random_model or [] if m.checkpoint]
            files += study.checkpoint_files(cells, folders)
    return results.to_json(), files


# ---------------------------------------------------------------------------------------------------------------------
# Two protocols: HUSAI's, and the earlier study's


def default_protocol(args) -> dict:
    """HUSAI's protocol: a transformer that solved its task, read at "=", with the controls of a verdict."""
    from husai.subjects.modular_addition import ModularAdditionConfig
    from husai.training.trainer import TrainingConfig

    return {
        "subject_config": ModularAdditionConfig(),
        "subject": args.subject,
        "store": args.activation_cache_dir,
        "hook_name": args.hook_name,
        "position": None,
        "rows": args.rows,
        "d_sae": args.d_sae,
        "k": args.k,
        "learning_rate": args.learning_rate,
        "recipe": TrainingConfig(tokens=args.tokens, batch_size=args.batch_size),
        "null_draws": args.null_draws,
        "judged": True,
    }


def published(args) -> dict:
    """The earlier study's protocol: seven tokens with the answer, read at the answer; untrained model; 120 Adam steps.

    The batch size and the number of layers were not published. HUSAI uses 1,024 and 2.
    """
    from husai.subjects.modular_addition import ModularAdditionConfig
    from husai.training.trainer import TrainingConfig

    return {
        "subject_config": ModularAdditionConfig(layout="published", n_layers=2, epochs=0),
        "subject": None,
        "store": None,
        "hook_name": "blocks.1.hook_resid_post",
        "position": 5,
        "rows": None,
        "d_sae": 1024,
        "k": 32,
        "learning_rate": 3e-4,
        "recipe": TrainingConfig(
            tokens=120 * 1024,
            batch_size=1024,
            warmup_fraction=0,
            decay_fraction=0,
            aux_coefficient=0,
            b_dec_init="mean",
        ),
        "null_draws": min(20, args.null_draws),
        "judged": False,
    }


def open_store(args, device, protocol: dict, random_seed: int | None = None):
    from husai.activations import source
    from husai.subjects.harvesting import Harvesting

    names = ("store", "subject", "hook_name", "position", "rows")
    given = {name: protocol[name] for name in names} | {"config": protocol["subject_config"], "text": args.text}
    given["harvesting"] = protocol.get("harvesting", Harvesting(max_norm_multiple=args.max_norm_multiple))
    return source.open_store(args.artifact_root, device, args.threads, **given, random_seed=random_seed)


def trained(args, cells, device, protocol: dict):
    """Train one SAE for each seed, and controls on Gaussian rows and the random-weights model; score every pair."""
    from husai.evidence.names import SCORES
    from husai.evidence.schemas import AlikeMember, Phase4aMember, Phase4aSection
    from husai.runs.subjects import is_language_model
    from husai.stability import controls, prototypes, study
    from husai.training.grid import members, train_or_find

    store = open_store(args, device, protocol)
    grid = members(args.seeds, [protocol["d_sae"]], [protocol["k"]], [protocol["learning_rate"]])
    arms = [train_or_find(cells, store, grid, protocol["recipe"], device, args.threads)]
    prototype_rows = gaussian = None
    if protocol["judged"]:
        gaussian = controls.gaussian(args.artifact_root, store, grid, protocol["recipe"], device, args.threads)
        prototype_rows = prototypes.of_store(store, args.artifact_root, protocol["d_sae"])

    language_model = is_language_model(protocol["subject"])
    if language_model and protocol["store"] is None:
        random_store = open_store(args, device, protocol, random_seed=0)
        arms.append(train_or_find(cells, random_store, grid, protocol["recipe"], device, args.threads))

    own_saes, *others = [arm.members for arm in arms]
    random_model = others.pop() if others else None
    steps = arms[0].snapshot_steps
    arguments = cells, store, own_saes, steps, protocol["null_draws"], args.threads, gaussian
    scores = protocol.get("scores", SCORES)
    section, drawn = study.score_trained(
        *arguments, random_model=random_model, scores=scores, prototype_rows=prototype_rows
    )
    fields = dict(section) | dict(drawn) | {"curve_steps": arms[0].curve_steps, "snapshot_steps": steps}
    fields["members"] = [
        Phase4aMember(**dict(m), curve=sae.curve, aux_steps=sae.aux_steps)
        for m, sae in zip(section.members, own_saes, strict=True)
    ]
    if random_model:
        fields["random_model"] = [AlikeMember.of(sae) for sae in random_model]
    if language_model:
        fields["cross_entropy"] = cross_entropy(args, cells, device, store, section)
    return Phase4aSection(**fields)


def cross_entropy(args, cells, device, store, section):
    """Cross-entropy of the language model with each SAE spliced in, on held-out documents."""
    from husai.dictionaries import checkpoints
    from husai.evidence.schemas import CrossEntropy
    from husai.runs.code import code_version
    from husai.subjects import pretrained, text
    from husai.training.recovered import cross_entropies, recovered

    tokenizer = None if args.text.packaged else pretrained.tokenizer_of(str(args.subject))
    texts = args.text.heldout_texts(args.core_texts, tokenizer)

    def compute() -> tuple[dict, list[Path]]:
        subject = pretrained.load(str(args.subject), device=device)
        saes = [checkpoints.load(args.output_dir / m.checkpoint) for m in section.members]
        losses = cross_entropies(subject, store.manifest.hook_name, saes, texts)
        return losses | {"recovered": recovered(losses)}, []

    key = {"subject": store.manifest.subject_digest, "saes": [m.checkpoint_sha256 for m in section.members]}
    key |= {"texts": [*map(text.document_id, texts)], "threads": args.threads, "device": args.device}
    key |= {"hook_name": store.manifest.hook_name}
    key["code"] = code_version(cross_entropies)
    return CrossEntropy.model_validate(cells.get("cross_entropy", key, compute))


# ---------------------------------------------------------------------------------------------------------------------
# The positive control: planted features


def is_default_subject(args) -> bool:
    """True if the phase runs on its default subject, as the gate's positive control requires."""
    return args.subject is None and args.activation_cache_dir is None and args.sae_root is None


def planted(args, cells, device):
    """Train SAEs of planted rows for each number of tokens, score them as in `trained`, and measure recovery."""
    from husai.activations.planted import planted_rows
    from husai.dictionaries import checkpoints
    from husai.evidence import rules
    from husai.evidence.names import ALIVE
    from husai.evidence.planted import sensitivity
    from husai.evidence.schemas import PlantedDegree, PlantedSection, Section, TrainedMember
    from husai.kernels.workers import one_torch_thread
    from husai.stability.recovery import recovery
    from husai.training.trainer import TrainingConfig

    data, degrees = rules.PLANTED, []
    with one_torch_thread():
        store, made = planted_rows(data, args.artifact_root / "activations")
    for tokens in rules.PLANTED_TOKENS:
        protocol = default_protocol(args) | {
            "subject": None,
            "store": store,
            "hook_name": rules.PLANTED_HOOK,
            "d_sae": data.features,
            "k": data.active,
            "learning_rate": rules.PLANTED_RATE,
            "recipe": TrainingConfig(tokens=tokens, batch_size=rules.PLANTED_BATCH),
            "scores": ALIVE,  # the rule reads these; scores of all features would take half as long again
        }
        section_of_degree = trained(args, cells, device, protocol)
        members = [{n: v for n, v in m if n in TrainedMember.model_fields} for m in section_of_degree.members]
        kept = {name: getattr(section_of_degree, name) for name in Section.model_fields} | {"members": members}
        with one_torch_thread():
            decoders = [checkpoints.load(args.output_dir / m.checkpoint).W_dec for m in section_of_degree.members]
            recovered = [recovery(W, made.features) for W in decoders]
        degrees.append(PlantedDegree(tokens=tokens, recovery=recovered, study=Section.model_validate(kept)))
    section_of_degree = sensitivity(degrees)
    return PlantedSection(data=data, batch_size=rules.PLANTED_BATCH, degrees=degrees, sensitivity=section_of_degree)


# ---------------------------------------------------------------------------------------------------------------------
# User-supplied checkpoints


def supplied(args, cells, device):
    """Score the checkpoints below --sae-root on the activations of a store."""
    from husai.dictionaries import foreign
    from husai.evals import loaded
    from husai.evidence.schemas import Phase4aSupplied, SuppliedMember
    from husai.runs.errors import BadInput
    from husai.runs.files import sha256_file
    from husai.runs.subjects import hub_name, is_language_model, with_stated_version
    from husai.stability import independence, prototypes, replicates, study
    from husai.subjects import harvesting

    protocol = default_protocol(args)
    folders = foreign.find(args.sae_root, hook_name=args.hook_name)
    saes = [foreign.open_checkpoint(folder) for folder in folders]
    harvesting_of_saes = loaded.common_harvesting(folders, saes, args.hook_name, "sae-root")
    harvesting_of_saes = loaded.with_multiple(harvesting_of_saes, args.max_norm_multiple)
    if is_language_model(args.subject):
        version = None if args.same_model else harvesting_of_saes.revision, harvesting_of_saes.dtype, args.dtype
        protocol |= {
            "subject": with_stated_version(args.subject, *version, "sae-root"),
            "harvesting": harvesting_of_saes,
        }
    store = open_store(args, device, protocol)
    _, heldout = store.split(protocol["recipe"].heldout_fraction)
    members, dictionaries, folders = [], [], foreign.find(args.sae_root, hook_name=store.manifest.hook_name)
    saes = [foreign.open_checkpoint(folder) for folder in folders]
    subject = hub_name(args.subject) if args.subject else store.manifest.subject
    for folder, sae in zip(folders, saes, strict=True):
        loaded.refuse_other_model(folder, sae, subject, "sae-root", args.same_model)
        for name, flag in args.declared.items():
            read = getattr(sae, name) or sae.metadata.get("training", {}).get(name)
            if read != getattr(args, name):
                raise BadInput(f"{flag} {getattr(args, name)}: {folder} has {name} {read or 'none'}; one expected")
    replicates.check("--sae-root", folders, saes)
    for folder in folders:
        name = str(folder.relative_to(args.sae_root))
        before = args.untrained_root / name if args.untrained_root else None
        dictionary, figures = study.external_dictionary(folder, store, heldout, before)
        dictionaries.append(dictionary)
        digest = sha256_file(foreign.weights_file(folder))
        members.append(SuppliedMember(label=name, checkpoint_sha256=digest, heldout=figures))
    notes = replicates.check("--sae-root", folders, saes, [m.heldout for m in members])
    if other := next(filter(None, (loaded.other_model(sae, subject) for sae in saes)), None):
        notes.append(f"--same-model alone says that {other}, which the SAEs' files name, is {subject}.")
    notes += [] if harvesting_of_saes.complete else [harvesting.line(harvesting.recorded(harvesting_of_saes))]
    missing = {"gaussian": "nothing is trained here; run_release_check.py trains them"}
    labels = [m.label for m in members]
    independence.refuse_shared(labels, dictionaries)
    independence.refuse_dependent(labels, [d.W_dec for d in dictionaries])
    prototype_rows = prototypes.of_store(store, args.artifact_root, max(len(d.W_dec) for d in dictionaries))
    arguments = cells, store, labels, dictionaries, args.null_draws, args.threads, missing
    compared, drawn = study.compare_all(*arguments, prototype_rows=prototype_rows)
    return Phase4aSupplied(members=members, notes=notes, **dict(compared), **dict(drawn))


# ---------------------------------------------------------------------------------------------------------------------
# Figures and summary


def draw(section, name: str, output_dir: Path) -> list[Path]:
    """Figures and the CSV of pairs."""
    from husai.evidence.schemas import Phase4aSection
    from husai.report import figures, language_model
    from husai.report.text import pair_rows, write_csv

    suffix, folder = "" if name == "husai" else f"_{name}", output_dir / "figures"
    files = [write_csv(output_dir / f"pairs{suffix}.csv", pair_rows(section))]
    files.append(figures.matches(section, section, folder / f"matches{suffix}.png"))
    if isinstance(section, Phase4aSection):
        files.append(figures.over_training(section, folder / f"over_training{suffix}.png"))
        files.append(figures.loss_curves(section, folder / f"loss_curves{suffix}.png"))
        if section.cross_entropy is not None:
            files.append(language_model.cross_entropy(section, section.cross_entropy, folder / "cross_entropy.png"))
    return files


def summary(results: dict) -> str:
    from husai.evidence.schemas import Phase4a

    phase = Phase4a.model_validate(results)
    parts = ["# Phase 4a: are the features more alike than chance?", "", *table(phase.husai)]
    if phase.planted is not None:
        parts += ["", "## The positive control: planted features", "", *positive_control(phase.planted)]
    if phase.published is not None:
        parts += ["", "## The earlier study's setting, run again", "", *comparison(phase.published)]
    return "\n".join(parts) + "\n"


def table(section) -> list[str]:
    """Lines of Markdown: the verdict, then each score with its nulls."""
    from husai.evidence.rules import outlier_note
    from husai.report.text import interval, strata

    stability, members = section.stability, section.members
    verdict = stability.verdict
    ev = [m.heldout.explained_variance for m in members]
    dead = [m.heldout.dead_share for m in members]
    lines = [
        f"**{verdict.outcome}**: {verdict.reason}. "
        f"Excess of `{verdict.score}` over the highest control ({verdict.highest_null}): "
        f"{interval(verdict.claimable_excess)}. {verdict.sentence}",
        "",
        f"{len(members)} SAEs on {section.hook_name}, {section.rows} rows of {section.d_in} coordinates "
        f"(effective rank {section.effective_rank:.1f}); held-out explained variance {min(ev):.4f} to "
        f"{max(ev):.4f}, dead features {min(dead):.0%} to {max(dead):.0%}.",
        "",
        *(
            line
            for note in getattr(section, "notes", outlier_note([m.heldout for m in members]))
            for line in (note, "")
        ),
        *spliced(section),
        "| score | trained, 95 % interval | null | null mean | excess, 95 % interval |",
        "|---|---|---|---|---|",
    ]
    for name, score in stability.scores.items():
        for i, (null, value) in enumerate(score.nulls.items()):
            first = f"`{name}` | {interval(score.observed)}" if i == 0 else " | "
            lines.append(f"| {first} | {null} | {value.mean:.4f} | {interval(score.excess[null])} |")
    lines += [f"\nNot computed: {null} ({why})." for null, why in stability.missing_nulls.items()]
    lines += ["", *strata({"trained": section})]
    lines += ["", "Intervals: delete-one-seed jackknife over seeds, t(S−1); pairs of seeds are not independent."]
    return lines


def positive_control(planted) -> list[str]:
    """Lines of Markdown: the verdict of the positive control, then the verdict at each degree of recovery."""
    from husai.evidence import levels, rules
    from husai.evidence.planted import turns_at
    from husai.report.text import interval
    from husai.report.text import table as rows_of

    control = rules.verdict(lambda: rules.positive_control(planted))
    data, last = planted.data, planted.degrees[-1]
    lines = [
        f"Positive control: **{control['outcome']}**: {control['reason']}. It is decided at {last.tokens:,} tokens, "
        f"where the recovery must be at least {levels.MIN_RECOVERY:g}.",
        "",
        f"{len(last.recovery)} SAEs for each number of tokens, on {data.rows:,} rows of {data.d_in} coordinates that "
        f"are made of {data.features} planted features, {data.active} a row. Recovery: mean signed cosine with the "
        "planted features, one to one.",
        "",
    ]
    rows = [
        [
            f"{s.tokens:,}",
            interval(s.recovery),
            "" if s.excess is None else f"{interval(s.excess)} over {s.over}",
            "passes" if s.passes else s.reason,
        ]
        for s in planted.sensitivity
    ]
    lines += rows_of(["tokens", "recovery, 95 % interval", "least excess, 95 % interval", "stability"], rows)
    if (ends := turns_at(planted.sensitivity)) is not None:
        turn = f"The verdict turns to a pass between a recovery of {ends[0]:.3f} and one of {ends[1]:.3f}."
    elif planted.sensitivity[-1].passes:
        turn = "The verdict is a pass at every degree, so that the method may see less recovery than was tried."
    else:
        turn = "The verdict is no pass at the largest recovery."
    return [*lines, "", turn]


def spliced(section) -> list[str]:
    """Lines on the cross-entropy with SAEs spliced in; empty without a language model."""
    if (losses := getattr(section, "cross_entropy", None)) is None:
        return []
    values, shares = losses.spliced, losses.recovered
    return [
        f"Cross-entropy on {losses.tokens} tokens of held-out documents: {losses.model:.4f} nats as the model "
        f"is, {min(values):.4f} to {max(values):.4f} with an SAE spliced in, {losses.zeroed:.4f} with zeros in its "
        f"place: {min(shares):.2%} to {max(shares):.2%} recovered.",
        "",
    ]


def comparison(section) -> list[str]:
    """Lines of Markdown: published figures, and figures of the same setting here."""
    from husai.report.text import interval

    score, verdict = section.stability.scores["pwmcc"], section.stability.verdict
    random, excess = score.nulls["isotropic"].mean, score.excess["isotropic"]
    return [
        "| | published | here |",
        "|---|---|---|",
        f"| trained (pwmcc) | {PUBLISHED['trained'][0]:.3f} to {PUBLISHED['trained'][1]:.3f} | "
        f"{interval(score.observed)} |",
        f"| random (pwmcc) | {PUBLISHED['random']} | {random:.4f} |",
        f"| difference | {PUBLISHED['difference'][0]:+} to {PUBLISHED['difference'][1]:+} | {interval(excess)} |",
        "",
        "The published difference is that of dictionaries which have hardly left their random initialisation, on a "
        "model that has learned nothing and whose input holds the answer. Here this setting is "
        f"**{verdict.outcome}**: {verdict.reason}. Excess of `{verdict.score}` over {verdict.highest_null} "
        f"{interval(verdict.claimable_excess)}.",
    ]


if __name__ == "__main__":
    run_main(main)
