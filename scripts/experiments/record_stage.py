"""Note a finished stage of the queue in its manifest.

    python scripts/experiments/record_stage.py MANIFEST PROFILE STAGE RETURN_CODE SECONDS FOLDER -- COMMAND...

The manifest has one record a stage, the last run's: command, return code, seconds, and the sha256 of the results that
the stage left in FOLDER (`-`: it leaves none).
"""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

from husai.runs.cli import Parser, run_main
from husai.runs.errors import BadInput
from husai.runs.files import read_json, sha256_file, write_json


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, command = sys.argv[1:at], sys.argv[at + 1 :]
    p = Parser(__doc__)
    p.add_argument("manifest", type=Path)
    p.add_argument("profile")
    p.add_argument("stage")
    p.add_argument("return_code", type=int)
    p.add_argument("seconds", type=int)
    p.add_argument("folder")
    args = p.parse_args(own)
    from husai.runs.folder import git_state

    try:
        manifest = read_json(args.manifest, "queue manifest")
        stages = {stage["stage"]: stage for stage in manifest["stages"]}
    except (BadInput, KeyError, TypeError):  # there is none yet, or it is damaged: it only says what ran
        stages = {}
    results = Path(args.folder) / "results.json"
    stages[args.stage] = {
        "stage": args.stage,
        "command": shlex.join(command),
        "return_code": args.return_code,
        "seconds": args.seconds,
        "ended_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": str(results) if args.folder != "-" else None,
        "results_sha256": sha256_file(results) if args.folder != "-" and results.is_file() else None,
    }
    commit, dirty, _ = git_state()
    about = {"profile": args.profile, "git_commit": commit, "git_dirty": dirty}
    write_json(args.manifest, about | {"stages": list(stages.values())})


if __name__ == "__main__":
    run_main(main)
