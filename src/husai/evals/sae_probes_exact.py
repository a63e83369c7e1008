"""SAEBench's `sparse_probing_sae_probes` with every probe solved to its optimum, all SAEs in one process.

Splits, ranking of features, grid of C, choice of C and objective are those of sae-probes (`run_sae_evals`, setting
`normal`). The official code minimises the L1 objective with saga, and stops after 1,000 iterations even without
convergence. This module uses scipy's L-BFGS-B (Byrd, Lu, Nocedal & Zhu 1995), which converges. The figures differ
slightly and therefore have another name: docs/benchmarks/probing.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits

from husai.kernels.workers import one_torch_thread
from husai.runs.errors import CheckFailed
from husai.runs.files import write_json
from husai.subjects.pretrained import quiet

if TYPE_CHECKING:
    from husai.evals.sae_probes import ProbeTask

GRID = np.logspace(-5, 5, 10)
"""Values of C, the inverse strength of the penalty."""
SOLVER = {"maxiter": 50_000, "maxfun": 50_000, "maxcor": 30, "ftol": 1e-16, "gtol": 1e-10}
TOLERANCE = 1e-9
"""Relative decrease of the objective below which the solver is not restarted."""
RESTARTS = 1000


@dataclass(frozen=True)
class Probe:
    """A logistic probe, fitted on all training rows at the C with the best validation AUC."""

    coefficients: np.ndarray
    """`[k]`."""
    intercept: float
    val_auc: float

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Log odds `[n]` of rows `[n, k]`."""
        return np.asarray(x, np.float64) @ self.coefficients + self.intercept


def fit(x: np.ndarray, y: np.ndarray) -> Probe:
    """Choose C on the last fifth of the rows (at most 100 rows), then fit all rows.

    Ties go to the largest C, as in sae-probes. Rows have the random order of sae-probes' split.

    Args:
        x: features `[n, k]`. n must be at least 128, because sae-probes splits fewer rows in another way.
        y: classes `[n]`, 0 or 1.

    Raises:
        CheckFailed: the solver did not converge.
    """
    if len(y) < 128:
        raise ValueError(f"{len(y)} training rows; at least 128 expected")
    x = np.asarray(x, np.float64)
    train = len(y) - min(int(0.2 * len(y)), 100)
    coefficients, intercepts = path(x[:train], y[:train], GRID)
    of_grid = auc(x[train:] @ coefficients.T + intercepts, y[train:])
    best = len(GRID) - 1 - np.argmax(of_grid[::-1])
    coefficients, intercepts = path(x, y, GRID[best : best + 1])
    return Probe(coefficients[0], float(intercepts[0]), float(of_grid[best]))


def path(x: np.ndarray, y: np.ndarray, Cs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimise C Σ log(1 + exp(−(2y − 1)(x·w + b))) + ‖w‖₁ for each C; b is free.

    w is the difference of two non-negative parts, which makes the objective smooth. Features are centred and scaled to
    help the solver. Their penalties are scaled accordingly, therefore the objective is unchanged.

    Args:
        x: `[n, k]`, float64. y: `[n]`, 0 or 1.
        Cs: in increasing order, because each solution is the start for the next C.

    Returns:
        (coefficients `[len(Cs), k]`, intercepts `[len(Cs)]`)

    Raises:
        CheckFailed: the solver did not converge.
    """
    (n, k), mean, scale = x.shape, x.mean(0), x.std(0)
    scale[scale == 0] = 1
    sign = 2.0 * y - 1
    signed = (x - mean) / scale * sign[:, None]
    transposed = np.ascontiguousarray(signed.T)
    bounds = [(0, None)] * (2 * k) + [(None, None)]
    at, coefficients, intercepts = np.zeros(2 * k + 1), [], []
    for C in Cs:
        penalty = 1 / (C * n * scale)

        def mean_objective(v: np.ndarray, penalty: np.ndarray = penalty) -> tuple[float, np.ndarray]:
            margin = signed @ (v[:k] - v[k:-1]) + v[-1] * sign
            wrong = expit(-margin)
            slope = transposed @ wrong / n
            value = penalty @ (v[:k] + v[k:-1]) - log_expit(margin).mean()
            return value, np.concatenate([penalty - slope, penalty + slope, [-(sign @ wrong) / n]])

        at = _minimum(mean_objective, at, bounds)
        w = (at[:k] - at[k:-1]) / scale
        coefficients.append(w)
        intercepts.append(at[-1] - w @ mean)
    return np.array(coefficients), np.array(intercepts)


def _minimum(function: Callable, start: np.ndarray, bounds: list[tuple]) -> np.ndarray:
    """Minimise by L-BFGS-B, restarted until the value stops decreasing. Nearly separable classes need restarts."""
    best = np.inf
    for _ in range(RESTARTS):
        solution = minimize(function, start, jac=True, method="L-BFGS-B", bounds=bounds, options=SOLVER)
        start, before, best = solution.x, best, min(best, solution.fun)
        if before - best <= TOLERANCE * best:
            return start
    raise CheckFailed(f"an L1 probe on {len(start) // 2} features did not converge in {RESTARTS} starts")


def auc(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column of `scores [n, ...]`, ties counted half (Mann & Whitney 1947)."""
    positive = y == 1
    n, m = positive.sum(), (~positive).sum()
    return (rankdata(scores, axis=0)[positive].sum(0) - n * (n + 1) / 2) / (n * m)


# ---------------------------------------------------------------------------------------------------------------------
# sae-probes' data sets


def run(tasks: list[ProbeTask], advance: Callable[[int], None]) -> None:
    """Write the figures of every data set that a task lacks, in sae-probes' layout.

    Raises:
        CheckFailed: a fit did not converge.
    """
    with one_thread(), quiet():
        for task in tasks:
            with task.locked():
                missing = [name for name in task.settings.data_sets if not task.file(name).exists()]
                encoder = _encoder(task) if missing else None
                for name in missing:  # an earlier holder of the lock may have written some
                    rows = _of_model(task, name) if encoder is None else _of_sae(task, name, encoder)
                    write_json(task.file(name), rows)
                    advance(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit every library to one thread, as in official workers. Figures then do not depend on --threads."""
    with one_torch_thread(), threadpool_limits(1):
        yield


def _encoder(task: ProbeTask):
    from husai.dictionaries import checkpoints
    from husai.evals.sae_probes import Linear

    if task.kind == "llm":
        return None
    if task.kind == "encoder":
        return Linear(task.encoder, task.device)
    return checkpoints.load(Path(task.encoder)).to(torch.device(task.device))


def _of_sae(task: ProbeTask, data_set: str, encoder) -> list[dict]:
    """One row for each k, in the layout of `sae_probes.run_sae_evals`."""
    s = task.settings
    split = ProbeSplit.of(encoder, data_set, s.model_name, s.hook_name, task.cache, task.seed, task.device)
    return [{"k": k, **split.metrics(k, s.binarize)} for k in s.ks]


def _of_model(task: ProbeTask, data_set: str) -> list[dict]:
    """Metrics of the model's own probe, by sae-probes' code, whose L2 fit converges with lbfgs."""
    from dataclasses import asdict

    from sae_probes.utils_data import get_dataset_sizes, get_xy_traintest
    from sae_probes.utils_training import find_best_reg

    s = task.settings
    rows = min(get_dataset_sizes()[data_set] - 100, 1024)
    split = get_xy_traintest(rows, data_set, s.hook_name, s.model_name, task.cache, seed=task.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [asdict(find_best_reg(*split, seed=task.seed).metrics)]


@dataclass(frozen=True)
class ProbeSplit:
    """An SAE's features on one data set, split and ranked by sae-probes."""

    x_train: torch.Tensor
    """`[n, d_sae]`."""
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    order: torch.Tensor
    """Features by decreasing |difference of the classes' means|, each feature divided by its mean activation."""

    @classmethod
    def of(
        cls, encoder, data_set: str, model_name: str, hook_name: str, cache: str, seed: int, device: str = "cpu"
    ) -> ProbeSplit:
        """Encode a data set's prompts.

        Args:
            encoder: object with `encode`: `[rows, d_in]` -> `[rows, d_sae]`.
            cache: folder that holds `model_activations_<model_name>/<data set>_<hook>.pt`.
        """
        from sae_probes.generate_sae_activations import generate_sae_activations
        from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization

        x = generate_sae_activations(
            sae=encoder,
            setting="normal",
            dataset=data_set,
            hook_name=hook_name,
            model_name=model_name,
            device=device,
            num_train=None,
            frac=None,
            model_cache_path=cache,
            seed=seed,
        )
        order = get_sorted_indices(x.X_train, x.y_train, mean_act_normalization)
        return cls(x.X_train, x.y_train, x.X_test, x.y_test, order)

    def chosen(self, x: torch.Tensor, k: int, binarize: bool = False) -> torch.Tensor:
        """The k highest-ranked features of rows `[n, d_sae]`, `[n, k]`."""
        features = x[:, self.order[:k]]
        return features != 0 if binarize else features

    def probe(self, k: int, binarize: bool = False) -> Probe:
        return fit(self.chosen(self.x_train, k, binarize).numpy(), self.y_train.numpy())

    def metrics(self, k: int, binarize: bool = False) -> dict[str, float]:
        """sae-probes' metrics of the probe on k features."""
        from sklearn.metrics import accuracy_score, f1_score

        probe = self.probe(k, binarize)
        scores, truth = probe.scores(self.chosen(self.x_test, k, binarize).numpy()), self.y_test.numpy()
        return {
            "test_f1": float(f1_score(truth, scores > 0, average="weighted")),
            "test_acc": float(accuracy_score(truth, scores > 0)),
            "test_auc": float(auc(scores, truth)),
            "val_auc": probe.val_auc,
        }
