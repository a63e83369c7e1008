"""The kernels that `make setup` compiles."""

import os
import sys

import pytest
from numba.core.dispatcher import Dispatcher

import processes
from husai.kernels import cpu_kernels


@pytest.mark.nightly  # a kernel that `make setup` leaves out is compiled by the first training
def test_every_kernel_is_compiled_and_kept(tmp_path):
    command, cache = [sys.executable, "-m", "husai.training.compile"], {"NUMBA_CACHE_DIR": str(tmp_path)}
    processes.run(command, env=os.environ | cache)
    kept = sorted(tmp_path.rglob("*.nbc"))
    names = {path.name.split("-")[0].removeprefix("cpu_kernels.") for path in kept}
    assert names == {name for name, value in vars(cpu_kernels).items() if isinstance(value, Dispatcher)}
    processes.run(command, env=os.environ | cache)
    assert sorted(tmp_path.rglob("*.nbc")) == kept, "a second time nothing is left to compile"
