"""Shared fixtures: small stores and subjects, and a way to run a script in this process."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import processes
from husai.activations.store import ActivationStore, StoreWriter

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on the CPU here
ROOT = Path(__file__).resolve().parents[1]
LIMIT, NIGHTLY_LIMIT = 1200.0, 3600.0
"""Seconds for one test on a machine at work."""
hypothesis.settings.register_profile("husai", deadline=None)  # an example is slow on a machine at work
hypothesis.settings.load_profile("husai")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _time_limit(request):
    """No test runs for ever, whatever it waits for."""
    limit = LIMIT if request.node.get_closest_marker("nightly") is None else NIGHTLY_LIMIT

    def late(number, frame):
        pytest.fail(f"took more than {limit:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def make_store(tmp_path):
    """`make_store(x)` -> an opened store of the rows `x [rows, d_in]`, with labels `[rows]` by name if given."""

    def make(
        x: torch.Tensor, name: str = "store", shard_rows: int = 65_536, labels: dict | None = None, **manifest
    ) -> ActivationStore:
        folder = tmp_path / name
        folder.mkdir()
        writer = StoreWriter(folder, x.shape[1], shard_rows=shard_rows)
        for start in range(0, len(x), 1000):
            part = slice(start, start + 1000)
            writer.append(x[part], {name: of[part] for name, of in (labels or {}).items()})
        about = {"subject": "synthetic", "subject_digest": "0" * 64, "hook_name": "hook", "position": "0"} | manifest
        writer.finish(**({"row_seed": 0, "control": None} | about))
        return ActivationStore.open(folder)

    return make


@pytest.fixture
def planted():
    """Rows made of 3 of 32 known unit features in 16 coordinates: (x `[6000, 16]`, features `[32, 16]`)."""
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(32, 16, generator=g), dim=1)
    chosen = torch.rand(6000, 32, generator=g).topk(3, dim=1).indices
    strength = torch.rand(6000, 3, generator=g) + 0.5
    return (strength.unsqueeze(-1) * features[chosen]).sum(1), features


@pytest.fixture(scope="session")
def small_subject(tmp_path_factory):
    """(artifact root, subject folder): a modular-addition transformer with p = 23, hardly trained, its target at 0."""
    from husai.subjects import modular_addition

    root = tmp_path_factory.mktemp("artifacts")
    config = modular_addition.ModularAdditionConfig(
        modulus=23, d_model=16, n_heads=2, d_mlp=32, epochs=2, hold_epochs=1, target_accuracy=0.0
    )
    return root, modular_addition.train_or_find(config, root / "subjects", torch.device("cpu"), 1)


@pytest.fixture(scope="session")
def small_activations(small_subject):
    """Folder of the store of the small subject's residual stream."""
    from husai.activations.harvest import harvest_modular_addition

    root, subject = small_subject
    return harvest_modular_addition(subject, root / "activations", "blocks.0.hook_resid_post")


def run_without_torch(script, *arguments) -> None:
    """Run a script in a process of its own; it must succeed and never import torch."""
    code = f"""
import runpy, sys
sys.argv = {[str(a) for a in (script, *arguments)]!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0
assert "torch" not in sys.modules
"""
    processes.run([sys.executable, "-c", code])


def call_script(path: str, *arguments) -> int:
    """Run a script in this process, whose imports are done; its exit code. A process of its own imports for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / path), run_name="__main__")
    torch.set_num_threads(1)
    logging.getLogger("husai").handlers.clear()
    return stopped.value.code or 0


@pytest.fixture
def run_script(capsys):
    """`run_script(path, *arguments)` -> (exit code, stdout, stderr), in this process."""

    def run(path: str, *arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call_script(path, *arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run_script):
    """`refused(named, script, *arguments)`: exit code 2 and one line, the last on stderr, that names each of `named`.

    `named` is a flag, a place or what the user gave, or several of these; `test_wording.py` holds the sentences.
    """

    def check(named, script, *arguments):
        code, _, err = run_script(script, *arguments)
        assert code == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert err.splitlines()[-1] == line
        assert err.count(line.removeprefix("error: ")) == 1, "it is said once"
        for name in named if isinstance(named, list | tuple) else [named]:
            assert str(name) in line, line

    return check
