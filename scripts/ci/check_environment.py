"""Is the environment what the pipeline needs? One line a fact; exit 2 where one does not hold.

python scripts/ci/check_environment.py --device cuda
"""

import importlib.metadata
import platform
import shutil
import subprocess

from husai.runs.cli import Parser, run_main
from husai.runs.errors import BadInput

PACKAGES = ("torch", "transformer-lens", "sae-lens", "sae-bench", "sae-probes", "numpy", "scipy", "pandas")


def main() -> None:
    p = Parser(__doc__)
    p.add_machine()
    args = p.parse_args()
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {args.threads} threads")
    for package in PACKAGES:
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            raise BadInput(f"{package} is not installed: make setup") from None
    if args.device == "cpu":
        return
    if shutil.which("nvidia-smi") is None:
        raise BadInput(f"--device {args.device}: no nvidia-smi here; PROFILE=embedded runs on a CPU")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    print(subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
    import torch

    if not torch.cuda.is_available():
        raise BadInput(f"--device {args.device}: this build of torch ({torch.__version__}) sees no GPU")


if __name__ == "__main__":
    run_main(main)
