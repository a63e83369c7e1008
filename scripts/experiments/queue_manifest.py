"""Maintain the queue's manifest: record a finished stage, and list the stages that can be skipped.

    python scripts/experiments/queue_manifest.py inputs MANIFEST PLACE -- COMMAND...
    python scripts/experiments/queue_manifest.py record MANIFEST PLACE PROFILE STAGE CODE SECONDS INPUTS -- COMMAND...
    bash QUEUE --dry-run | python scripts/experiments/queue_manifest.py finished MANIFEST --always STAGE...

The manifest has one record for each stage, of its last run, in the order of the runs. A record holds the command, its
return code, and the sha256 of every file below PLACE (a folder or a file that the stage writes; `-`: none) and of other
files that its cells depend on. It also holds a digest of the inputs: the code, the packages, and the key of the
script's flags (`runs.inputs`: a file counts by its content). `inputs` prints this digest before a stage begins. A
different digest at the end shows that the inputs changed during the run. INPUTS are empty for a stage that always runs.

`finished` reads the commands of the dry run and prints `STAGE RETURN_CODE` for every stage that can be skipped. The
queue skips a stage if its command, code, inputs and outputs are unchanged, and all earlier stages ran before it and are
skipped too. Changes are named on stderr. All stages from the first changed one on are run, and each reads its finished
cells. A stage without outputs always runs, and so do the stages that the queue names (`--always`). Changes in their
outputs are reported, but do not affect other stages.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import husai
from husai.runs.cli import Parser, run_main
from husai.runs.errors import BadInput
from husai.runs.files import digest, read_json, sha256_file, write_json
from husai.runs.inputs import key_of
from husai.runs.machine import usable_cores

STAGE = re.compile(r"^== (\w+)\n(.+)$", re.M)
NO_PLACE = "-"
SCRIPTS = Path(__file__).resolve().parents[1]
WORKING = ("logs", "workers", "encoders")
"""Folders with intermediate files of cells, which are not read again."""


def parse():
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    p = Parser(__doc__)
    p.add_argument("verb", choices=["inputs", "record", "finished"])
    p.add_argument("manifest", type=Path)
    p.add_argument("about", nargs="*", help="PLACE; with record also PROFILE STAGE CODE SECONDS INPUTS")
    p.add_argument("--always", nargs="*", default=[], metavar="STAGE", help="stages that run each time (finished)")
    args = p.parse_args(sys.argv[1:at])
    args.command, args.manifest = sys.argv[at + 1 :], args.manifest.resolve()
    expected = {"inputs": 1, "record": 6, "finished": 0}[args.verb]
    if len(args.about) != expected or bool(args.command) != bool(expected):
        p.error(f"{args.verb}: other arguments expected, as --help shows them")
    return args


def main() -> None:
    args = parse()
    if args.verb == "inputs":
        print(follows_from(args.command))
    elif args.verb == "record":
        record(args.manifest, args.command, *args.about)
    else:
        for stage, code in standing(args.manifest, dict(STAGE.findall(sys.stdin.read())), args.always):
            print(stage, code)


def record(
    manifest: Path, command: list[str], place: str, profile: str, stage: str, code: str, seconds: str, before: str
) -> None:
    from husai.runs.folder import git_state

    try:
        stages = read(manifest)
    except BadInput:  # the manifest is damaged, and only records past runs
        stages = {}
    stages.pop(stage, None)  # the new record goes to the end
    commit, dirty, _ = git_state()
    after = follows_from(command)
    stages[stage] = {
        "stage": stage,
        "command": shlex.join(command),
        "return_code": whole(code),
        "seconds": whole(seconds),
        "ended_utc": datetime.now(UTC).isoformat(timespec="microseconds"),
        "git_commit": commit,
        "git_dirty": dirty,
        "follows_from": after if before in ("", after) else f"changed while it ran: {before}, then {after}",
        "place": place,
        "files": {str(path): sha256_file(path) for path in [*files(place), *shared(place)]},
    }
    write_json(manifest, {"profile": profile, "stages": list(stages.values())})


def whole(text: str) -> int:
    if not text.isdecimal():
        raise BadInput(f"record: {text!r} is no whole number")
    return int(text)


def standing(manifest: Path, commands: dict[str, str], always: list[str]) -> list[tuple[str, int]]:
    """(stage, return code) of the stages that can be skipped, in order.

    Args:
        always: stages that run each time.
    """
    try:
        stages = read(manifest)
    except BadInput as error:
        print(f"{error}: every stage is looked at again", file=sys.stderr)
        return []
    ran = list(stages)
    skippable, unchanged, last = [], True, -1
    for stage, line in commands.items():
        if stage not in stages:
            unchanged = unchanged and stage in always
            continue
        noted = stages[stage]
        if noted["place"] == NO_PLACE:
            continue
        problems = changed(noted, line)
        if stage not in always:
            if ran.index(stage) < last:
                problems.append("a stage before it was run since it ended")
            last = max(last, ran.index(stage))
            unchanged = unchanged and not problems
            if unchanged:
                skippable.append((stage, noted["return_code"]))
        for problem in problems:
            print(f"{stage}: {problem}", file=sys.stderr)
    return skippable


def changed(noted: dict, line: str) -> list[str]:
    """Reasons why a stage cannot be skipped; empty if it can."""
    code, recorded_files = noted["return_code"], noted["files"]
    results = str(Path(noted["place"], "results.json"))
    if code != 0 and not (code == 1 and results in recorded_files):  # with results, 1 means that a check failed
        return [f"it ended with exit code {code}"]
    if not recorded_files:
        return ["it left nothing"]
    command = shlex.split(line)
    if noted["command"] != shlex.join(command):
        return ["its command is another"]
    problems = []
    if noted["follows_from"] != follows_from(command):
        problems.append("the code, the packages or what its command names is another")
    damaged = ((name, Path(name), sha256) for name, sha256 in recorded_files.items())
    return problems + [
        f"{name} {'was changed after it ended' if path.is_file() else 'is gone'}"
        for name, path, sha256 in damaged
        if not path.is_file() or sha256_file(path) != sha256
    ]


def read(manifest: Path) -> dict[str, dict]:
    """Stage -> its record; empty if there is no manifest yet.

    Raises:
        BadInput: the manifest is damaged.
    """
    if not manifest.exists():
        return {}
    content = read_json(manifest, "queue manifest")
    try:
        stages = {stage["stage"]: stage for stage in content["stages"]}
        for stage in stages.values():
            digests = [
                *stage["files"].items(),
                (stage["place"], stage["follows_from"]),
                (stage["command"], stage["ended_utc"]),
            ]
            if not all(isinstance(text, str) for pair in digests for text in pair):
                raise TypeError("a text expected")
            if type(stage["return_code"]) is not int:
                raise TypeError("a return code expected")
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"queue manifest: {manifest} is damaged ({type(error).__name__}: {error})") from None
    return stages


def files(place: str) -> list[Path]:
    """Files that a stage wrote at its place, except working folders and hidden files (locks, partial files)."""
    path = Path(place)
    if place == NO_PLACE or not path.exists():
        return []
    if path.is_file():
        return [path]
    below = (p for p in sorted(path.rglob("*")) if p.is_file())
    return [p for p in below if not any(part in WORKING or part[0] == "." for part in p.relative_to(path).parts)]


def shared(place: str) -> list[Path]:
    """Files outside a stage's place that its cells depend on, such as controls that phases share."""
    paths = set()
    for cell in Path(place).rglob("cells/[!.]*.json") if place != NO_PLACE else []:
        root = cell.parents[1].resolve()
        named = {Path(os.path.normpath(root / name)) for name in read_json(cell, "cell").get("artefacts", {})}
        paths |= {path for path in named if not path.is_relative_to(Path(place).resolve()) and path.is_file()}
    return sorted(paths)


def follows_from(command: list[str]) -> str:
    """Digest of the code, the packages, the cores, and the key of the command's arguments."""
    return digest([own_code(), key(command)])


def key(command: list[str]) -> dict | None:
    """Key of a command's arguments, by the script's own flags.

    None for arguments that the script will refuse, and for a command without a `parse`.
    """
    if len(command) < 2 or (parse := runpy.run_path(command[1]).get("parse")) is None:
        return None
    own_arguments, sys.argv = sys.argv, command[1:]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return key_of(parse())
    except (BadInput, SystemExit):
        return None
    finally:
        sys.argv = own_arguments


@cache
def own_code() -> list:
    """Digests of the code and of the packages, and the number of cores.

    Comments count. A stage that is run again because of a changed comment finds its cells.
    """
    package = Path(husai.__file__).parent
    files = [path for folder in (package, SCRIPTS) for path in sorted(folder.rglob("*.py"))]
    # The name of a folder gives name and version. Parsing 170 metadata files would take most of this script's time.
    installed = sorted(p.name for place in sys.path if place for p in Path(place).glob("*.*-info"))
    return [digest([sha256_file(path) for path in files]), digest(installed), usable_cores()]


if __name__ == "__main__":
    run_main(main)
