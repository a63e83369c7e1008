"""Domain-specific flags that several scripts share. It imports no heavy library, so that `--help` is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from husai.evals.inputs import by_baseline_map, by_checkout, by_named_checkpoint, by_text
from husai.evidence import levels
from husai.evidence.data_sets import DATA_SETS
from husai.evidence.levels import SPECTRAL_DRAWS, K
from husai.runs import cli
from husai.runs.checkpoints import EXPECTED, refuse_none
from husai.runs.cli import fraction, index_list, int_list, name_list, positive_float, positive_int
from husai.runs.errors import BadInput
from husai.runs.inputs import Arguments, by_content_or_name, by_subject, not_at_all
from husai.runs.subjects import DTYPES, SubjectName, with_version
from husai.subjects.hooks import hook_name_of
from husai.subjects.sources import TextSource, with_flags

CHECKPOINTS = ("decoders", "checkpoint", "untrained", "reference", "random_model_checkpoint", "relatives")
"""Arguments that name SAEs."""
READ = ("covariance", "activation_cache_dir", "target_activation_cache_dir")
"""Arguments that name other files and folders to read; their defaults name none."""


def refuse_missing(args: argparse.Namespace) -> None:
    """Raise BadInput for input that is not on this machine, before torch is imported."""
    for name in CHECKPOINTS:
        flag, paths = f"--{name.replace('_', '-')}", getattr(args, name, None) or []
        if name == "decoders":
            refuse_none(paths, name, f"a .npy, {EXPECTED.removeprefix('a ')}")
        else:
            refuse_none(paths if isinstance(paths, list) else [paths], flag)
    for name in READ:
        path = getattr(args, name, None)
        if path is not None and not Path(path).exists():
            raise BadInput(f"--{name.replace('_', '-')}: {path} does not exist")
    subject = getattr(args, "subject", None)
    place = Path(SubjectName.parse(subject).name) if subject is not None else Path()
    if (place.is_absolute() or len(place.parts) > 2) and not place.is_dir():  # a hub name is OWNER/NAME or NAME
        raise BadInput(f"--model-name: {place} is no folder; husai-tiny, a Hugging Face folder, or a hub name expected")


def probe_ks(text: str) -> list[int]:
    """Parse numbers of features of a probe, which must include K."""
    ks = int_list(text)
    if K not in ks:
        raise argparse.ArgumentTypeError(f"{text!r} lacks {K}, which is judged")
    return ks


def multiple(text: str) -> float:
    """Parse a multiple of the median norm, which must exceed 1."""
    value = positive_float(text)
    if value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 1; half of all rows have more than the median norm")
    return value


class EvalParser(cli.Parser):
    """Parser with the flags of subjects, SAEs, benchmarks and studies."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "judged SAEs and evidence": (
            *("decoders", "checkpoint", "candidate", "untrained", "reference", "random_model_checkpoint", "sae_root"),
            *("untrained_root", "covariance", "rows_are_features", "siblings", "relatives"),
            "features",
            *("phase4a_results", "random_model_results", "transcoder_results", "ood_results", "confirmation_results"),
            *("external_candidate_json", "study_results", "frontier_results", "scaling_results"),
        ),
        "model": (
            *(
                "subject",
                "same_model",
                "revision",
                "dtype",
                "hook_name",
                "hook_layer",
                "hook_layers",
                "layer",
                "random_model",
            ),
            *("random_seed", "activation_cache_dir", "target_activation_cache_dir"),
        ),
        "text": ("text", "text_column", "text_split"),
        "sizes": (
            *("architecture", "architectures", "d_sae", "d_saes", "d_sae_values", "k", "ks", "k_candidates", "seeds"),
            *("tokens", "token_budgets", "epochs", "batch_size", "learning_rate", "rows", "train_rows", "heldout_rows"),
            *("max_norm_multiple", "buffer_rows", "null_draws", "confirmation_seeds"),
        ),
        "benchmarks": (
            *("run_saebench", "dataset_names", "probing", "probe_ks", "core_texts", "run_cebench", "cebench_repo"),
            *("stories", "max_rows", "cebench_matched_baseline_map", "matched_baseline_summary", "require_matched"),
            *("noise_seeds",),
        ),
        **cli.Parser.groups,
    }

    def add_model_name(self, default: str | None = "husai-tiny", **more) -> None:
        """Add --model-name (also --subject), --revision and --dtype."""
        description = "language model: husai-tiny, a Hugging Face folder, a hub name (default: %(default)s)"
        settings: dict[str, Any] = {"help": description, "counts": by_subject} | more
        self.add_argument("--model-name", "--subject", dest="subject", default=default, **settings)
        self.add_argument("--revision", counts=not_at_all, help="branch, tag or commit of a hub name, as step3000")
        self.add_argument(
            "--dtype",
            choices=DTYPES,
            counts=not_at_all,
            help="type of the model's weights and arithmetic (default: that in the files of the SAEs, else float32)",
        )

    def add_same_model(self) -> None:
        """Add --same-model."""
        self.add_argument(
            "--same-model",
            action="store_true",
            help="the SAEs were trained on this model, even if their files name another; the decision states it",
        )

    def add_text(self) -> None:
        """Add the flags of scripts that make activations: --text, --text-column, --text-split, --max-norm-multiple.

        `args.text` is a `subjects.sources.TextSource`.
        """
        self.add_argument(
            "--text",
            metavar="SOURCE",
            default=TextSource(),
            counts=by_text,
            help="text of a language model: packaged (of the sae-probes package); a file or folder of .txt (a line a "
            "document), .jsonl, .json, .csv or .parquet (also .gz, .zst); a folder of datasets.save_to_disk; or a "
            "hub name org/name[:config][@revision], streamed (default: %(default)s)",
        )
        self.add_argument(
            "--text-column",
            default=TextSource.column,
            counts=not_at_all,
            help="column of texts, or of ids of the model's own tokenizer (default: %(default)s)",
        )
        self.add_argument(
            "--text-split",
            default=TextSource.split,
            counts=not_at_all,
            help="split of a data set (default: %(default)s)",
        )
        self.add_argument(
            "--max-norm-multiple",
            type=multiple,
            metavar="M",
            help="leave out rows whose norm exceeds M times the median norm (default: none; training shortens rows of "
            "more than 10 times)",
        )

    def add_source(self, hook: str) -> None:
        """Add the subject of a phase: --model-name, --hook-name, --layer, --activation-cache-dir, --rows, --text."""
        self.add_model_name(
            None,
            type=Path,
            help="folder of a trained transformer (default: train or find it), or a language model: husai-tiny, "
            "a Hugging Face folder, a hub name",
        )
        self.add_argument(
            "--hook-name",
            help=f"default: {hook}, blocks.1.hook_resid_pre of a language model, or that of --activation-cache-dir",
        )
        self.add_argument("--rows", type=positive_int, help="rows of a language model's activations (default: 1000000)")
        self.add_argument(
            "--layer", type=int, counts=not_at_all, help="short for --hook-name blocks.LAYER.hook_resid_post"
        )
        self.add_argument("--activation-cache-dir", type=Path, help="a store to use in place of harvesting one")
        self.add_text()

    def add_recipe(self, d_sae: int, tokens: int, batch_size: int, learning_rate: float = 3e-3) -> None:
        """Add the recipe of SAEs and scores: --d-sae, --tokens, --batch-size, --learning-rate, --null-draws."""
        self.add_argument("--d-sae", type=positive_int, default=d_sae, help="features (default: %(default)s)")
        self.add_argument(
            "--tokens", type=positive_int, default=tokens, help="rows that each SAE sees (default: %(default)s)"
        )
        self.add_argument("--batch-size", type=positive_int, default=batch_size, help="default: %(default)s")
        self.add_argument("--learning-rate", type=positive_float, default=learning_rate, help="default: %(default)s")
        self.add_null_draws()

    def add_null_draws(self) -> None:
        """Add --null-draws."""
        self.add_argument(
            "--null-draws",
            type=positive_int,
            default=SPECTRAL_DRAWS,
            help="draws of the spectral null for each pair (default: %(default)s)",
        )

    def add_cebench(self) -> None:
        """Add the paths of CE-Bench's own code and stories: --cebench-repo, --stories."""
        self.add_argument(
            "--cebench-repo",
            type=Path,
            counts=by_checkout,
            help="your checkout of CE-Bench, whose own code then runs as well",
        )
        self.add_argument(
            "--stories",
            counts=by_content_or_name,
            help="CE-Bench's data: a name on the hub, or a local copy (default: local pairs)",
        )

    def add_baseline_map(self) -> None:
        """Add --cebench-matched-baseline-map."""
        self.add_argument(
            "--cebench-matched-baseline-map",
            type=Path,
            counts=by_baseline_map,
            help="JSON file: hook name, layer or default -> path of a summary, or null",
        )

    def add_core_texts(self) -> None:
        """Add --core-texts."""
        self.add_argument(
            "--core-texts",
            type=positive_int,
            default=200,
            help="held-out documents for the cross-entropy with an SAE spliced in (default: %(default)s)",
        )

    def add_probing(self, default: str = "sae_probes") -> None:
        """Add --probing."""
        self.add_argument(
            "--probing",
            choices=("sae_probes", "sae_probes_exact"),
            default=default,
            help="sae-probes' own code, or the same probes solved to their optimum, which is many times faster; "
            "figures of the two are never compared (default: %(default)s)",
        )

    def add_probe_ks(self) -> None:
        """Add --probe-ks."""
        self.add_argument(
            "--probe-ks",
            type=probe_ks,
            default="1,5,16",
            help=f"numbers of features of a probe; {K} is judged (default: %(default)s)",
        )

    def add_train_rows(self) -> None:
        """Add --train-rows."""
        self.add_argument(
            "--train-rows",
            type=positive_int,
            help="rows of the SAEs' training activations (default: those of stores below --artifact-root)",
        )

    def add_checkpoints(self, required: bool) -> None:
        """Add SAEs of a language model: --checkpoint, --model-name, --hook-name, --hook-layer, --rows, --text."""
        self.add_argument(
            "--checkpoint",
            "--checkpoints",
            type=Path,
            counts=by_named_checkpoint,
            nargs="+",
            required=required,
            default=[],
            help="SAEs to evaluate: checkpoints, folders of checkpoints, sae-lens:RELEASE/SAE_ID, or "
            "hf:REPO[@REVISION]/PATH; SAEs that differ in their seed alone are one condition",
        )
        self.add_model_name()
        self.add_same_model()
        self.add_argument(
            "--hook-name", help="hook, or module for its output (default: blocks.HOOK_LAYER.hook_resid_pre)"
        )
        self.add_argument(
            "--hook-layer", type=int, help="block of the default hook (default: that of --hook-name, else 1)"
        )
        self.add_argument(
            "--rows",
            type=positive_int,
            default=100_000,
            help="held-out rows for L0, explained variance and PCA (default: %(default)s)",
        )
        self.add_text()

    def add_benchmark(self, needs_checkpoint: bool = True) -> None:
        """Add SAEs of an external benchmark: the flags of `add_checkpoints`, --reference, --random-model-checkpoint."""
        self.add_checkpoints(needs_checkpoint)
        self.add_argument(
            "--reference",
            type=Path,
            counts=by_named_checkpoint,
            nargs="+",
            default=[],
            help="further SAEs that may serve as matched references (those of --checkpoint may serve as well)",
        )
        self.add_argument(
            "--random-model-checkpoint",
            type=Path,
            counts=by_named_checkpoint,
            nargs="+",
            default=[],
            help="SAEs of the random-weights model with the same recipe",
        )

    def add_candidate(self) -> None:
        """Add the SAEs of a stress test: --candidate, or the flags of `add_checkpoints`."""
        self.add_argument(
            "--candidate",
            type=Path,
            help="results of run_candidate_confirmation.py (default: those below --artifact-root, if there "
            "are any; else the embedded default is trained)",
        )
        self.add_checkpoints(required=False)

    def add_supplied(self, required: bool = True) -> None:
        """Add user-supplied SAEs: the flags of `add_benchmark`, and those of their evidence."""
        self.add_benchmark(required)
        self.add_untrained()
        self.add_dataset_names()
        self.add_probing("sae_probes_exact")
        self.add_cebench()
        self.add_max_rows()
        self.add_null_draws()

    def add_untrained(self) -> None:
        """Add --untrained."""
        self.add_argument(
            "--untrained",
            type=Path,
            counts=by_named_checkpoint,
            nargs="+",
            default=[],
            help="the same SAEs before training, in the order of --checkpoint, unless their folders contain them",
        )

    def add_dataset_names(self) -> None:
        """Add --dataset-names."""
        self.add_argument(
            "--dataset-names",
            type=name_list,
            default=DATA_SETS,
            help="data sets of sae-probes, by names or sides; fewer than the default give no verdict",
        )

    def add_max_rows(self) -> None:
        """Add --max-rows."""
        self.add_argument("--max-rows", type=positive_int, default=200, help="story pairs (default: %(default)s)")

    def add_study(self) -> None:
        """Add the flags of a study of whole banks of SAEs: subject, sizes, benchmarks."""
        self.add_model_name()
        self.add_text()
        self.add_argument(
            "--rows", type=positive_int, default=300_000, help="rows of an activation store (default: %(default)s)"
        )
        self.add_argument("--batch-size", type=positive_int, default=512, help="default: %(default)s")
        self.add_argument("--learning-rate", type=positive_float, default=3e-3, help="default: %(default)s")
        self.add_null_draws()
        self.add_argument(
            "--heldout-rows", type=positive_int, default=50_000, help="rows for held-out figures (default: %(default)s)"
        )
        self.add_argument("--run-saebench", action="store_true", help="sae-probes, against matched references")
        self.add_dataset_names()
        self.add_probing()
        self.add_probe_ks()
        self.add_core_texts()
        self.add_argument("--run-cebench", action="store_true", help="CE-Bench's score, against matched references")
        self.add_cebench()
        self.add_max_rows()
        self.add_baseline_map()
        self.add_argument(
            "--require-matched", action="store_true", help="exit 2 if a condition has no matched reference"
        )

    def add_feature_reliability(self) -> None:
        """Add the SAE whose features are judged, and its siblings: the flags of `add_candidate` and of a training."""
        self.add_candidate()
        self.add_argument(
            "--siblings", type=int, help="number of siblings to train (default: 14 for one checkpoint, else 0)"
        )
        self.add_argument(
            "--tokens",
            type=positive_int,
            help="training tokens of each sibling (default: as many as those of the SAE)",
        )
        self.add_argument(
            "--train-rows",
            type=positive_int,
            help="different activations among the tokens of trained siblings (default: up to 1000000)",
        )
        self.add_argument(
            "--buffer-rows",
            type=positive_int,
            help="train siblings on a stream of activations, through a buffer of so many rows, each row once",
        )
        self.add_argument(
            "--relatives",
            type=Path,
            nargs="*",
            counts=by_named_checkpoint,
            metavar="SAE",
            help="other SAEs of the hook instead of siblings; without a name: those of SAELens' catalogue",
        )
        self.add_argument(
            "--features", type=index_list, help="features whose contexts are shown, as 12,34 (default: a sample)"
        )
        self.add_argument(
            "--contexts",
            type=positive_int,
            default=200,
            help="number of features in the sample of --features (default: %(default)s)",
        )
        thresholds = {
            "--recurs-cosine": (levels.RECURS_COSINE, "least decoder cosine with a partner"),
            "--recurs-correlation": (levels.RECURS_CORRELATION, "least held-out correlation with a partner"),
            "--certify-at": (levels.CERTIFIED_AT, "share π of trainings that a certified feature recurs in"),
        }
        for flag, (threshold, meaning) in thresholds.items():
            self.add_argument(flag, type=fraction, default=threshold, help=f"{meaning} (default: %(default)s)")
        self.add_argument(
            "--rotations", type=positive_int, help="random rotations of the null (default: by the number of features)"
        )

    def parse_feature_reliability(self, words: list[str] | None = None) -> argparse.Namespace:
        """Arguments; exit 2 if the number of siblings is negative, or flags of a training would have no effect."""
        args = self.with_hook(self.parse_args(words))
        if args.siblings is not None and args.siblings < 0:
            self.error(f"--siblings {args.siblings}: 0 or more expected")
        if args.relatives is not None:
            unused = ("siblings", "tokens", "train_rows", "buffer_rows")
            self.refuse_unused(args, unused, "nothing is trained with --relatives")
        return args

    def parse_args(self, args=None, namespace=None) -> Arguments:  # type: ignore[override]
        """Arguments with `text` and `subject` as one object each, and `hook_name` in TransformerLens' spelling.

        `text` joins --text, --text-column and --text-split. `subject` joins --model-name, --revision and --dtype. Exits
        2 for an invalid text, or a revision of a folder.
        """
        arguments = super().parse_args(args, namespace)
        try:
            refuse_missing(arguments)
            if hasattr(arguments, "text"):
                arguments.text = with_flags(arguments.text, arguments.text_column, arguments.text_split)
            if hasattr(arguments, "revision"):
                arguments.subject = with_version(arguments.subject, arguments.revision, arguments.dtype)
            if hook := getattr(arguments, "hook_name", None):
                arguments.hook_name = [*map(hook_name_of, hook)] if isinstance(hook, list) else hook_name_of(hook)
        except BadInput as error:
            self.error(str(error))
        return arguments

    def given(self, names: Iterable[str]) -> dict[str, str]:
        """Argument -> its flag, for the arguments that are on the command line."""
        words = {word.partition("=")[0] for word in sys.argv[1:]}
        flags = {action.dest: words.intersection(action.option_strings) for action in self._actions}
        return {name: min(flags[name]) for name in names if flags[name]}

    def refuse_unused(self, args: argparse.Namespace, names: Iterable[str], reason: str) -> None:
        """Exit 2 if one of these arguments was given, because it would have no effect."""
        flags = {action.dest: action.option_strings[0] for action in self._actions}
        for name in names:
            if getattr(args, name) != self.get_default(name):
                self.error(f"{flags[name]}: {reason}")

    def parse_benchmark(self) -> argparse.Namespace:
        """Arguments, with the default of --hook-name."""
        return self.with_hook(self.parse_args())

    def with_hook(self, args: argparse.Namespace) -> argparse.Namespace:
        """Arguments, with the default of --hook-name; exit 2 if --hook-layer names another layer."""
        if args.hook_name is None:
            args.hook_name = f"blocks.{1 if args.hook_layer is None else args.hook_layer}.hook_resid_pre"
        elif args.hook_layer is not None and not args.hook_name.startswith(f"blocks.{args.hook_layer}."):
            self.error(f"--hook-layer {args.hook_layer} with --hook-name {args.hook_name}: one layer expected")
        args.hook_layer = None  # --hook-name contains the layer
        return args

    def parse_phase(self) -> argparse.Namespace:
        """Arguments, with --layer as --hook-name; exit 2 if flags contradict each other or would have no effect."""
        args = self.parse_args()
        from husai.runs.subjects import is_language_model

        if args.layer is not None:
            meant = f"blocks.{args.layer}.hook_resid_post"
            if args.hook_name not in (None, meant):
                self.error(f"--layer {args.layer} means {meant}, --hook-name is {args.hook_name}: one of them expected")
            args.hook_name = meant
        if args.rows is not None and (args.activation_cache_dir or not is_language_model(args.subject)):
            self.error(
                f"--rows {args.rows}: goes with a language model as --model-name, whose activations are harvested"
            )
        if not args.text.packaged and not is_language_model(args.subject):
            self.error(f"--text {args.text}: goes with a language model as --model-name")
        for flag in ("seeds", "confirmation_seeds", "reference_seeds", "confirmation_reference_seeds"):
            seeds = getattr(args, flag, None)
            if seeds is not None and len(seeds) < 2 and getattr(args, "sae_root", None) is None:
                self.error(
                    f"--{flag.replace('_', '-')} {seeds[0]}: one seed says nothing about stability; "
                    "at least 2 expected, 5 for a verdict"
                )
        return args

    def refuse_overlap(self, **seeds: list[int]) -> None:
        """Exit 2 if two of these flags share a seed."""
        flags = list(seeds)
        for i, first in enumerate(flags):
            for second in flags[i + 1 :]:
                if shared := sorted(set(seeds[first]) & set(seeds[second])):
                    names = (f"--{f.replace('_', '-')}" for f in (first, second))
                    self.error(f"{' and '.join(names)} share seed {shared[0]}: seeds of their own expected")
