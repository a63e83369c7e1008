"""Check that the environment meets the pipeline's needs. Prints one line for each fact; exit 2 if one does not hold.

python scripts/ci/check_environment.py --device cuda --executor ray --dataset-names probe
"""

import importlib.metadata
import platform
import shutil
import subprocess

from husai.runs.cli import Parser, name_list, run_main
from husai.runs.errors import BadInput

PACKAGES = ("torch", "transformer-lens", "sae-lens", "sae-bench", "sae-probes", "numpy", "scipy", "pandas")


def main() -> None:
    p = Parser(__doc__)
    p.add_machine()
    p.add_argument("--executor", default="local", choices=["local", "ray"], help="default: %(default)s")
    p.add_argument("--dataset-names", type=name_list, default=[], help="probing data sets that are to be used")
    args = p.parse_args()
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {args.threads} threads")
    for package in (*PACKAGES, *(["ray"] if args.executor == "ray" else [])):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            install = "pip install -r requirements-cluster.txt" if package == "ray" else "make setup"
            raise BadInput(f"{package} is not installed: {install}") from None
    if args.dataset_names:
        from husai.evals.sae_probes import check_data_sets

        print(f"{len(check_data_sets(args.dataset_names))} probing data sets")
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
