"""The queue: every stage in its order, what is refused, what it leaves behind. The stages have tests of their own."""

import fcntl
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from miniature import few_texts, save_miniature

ROOT = Path(__file__).parents[1]
QUEUE = "scripts/experiments/run_b200_high_impact_queue.sh"
MANIFEST = "scripts/experiments/queue_manifest.py"
ALWAYS = "gate", "report"


def queue(*arguments, **variables):
    environment = os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"} | variables
    command = ["bash", QUEUE, *arguments]
    return processes.run(command, 120, check=False, env=environment)


def stages(done):
    return re.findall(r"^== (\w+)$", done.stdout, re.M)


def commands(done):
    """stage -> its command line."""
    return dict(re.findall(r"^== (\w+)\n(.+)$", done.stdout, re.M))


@pytest.mark.parametrize("profile", ["embedded", "b200", "smoke"])
def test_a_dry_run_prints_every_command_and_runs_none(tmp_path, profile):
    done = queue("--dry-run", OUTPUT=str(tmp_path / "out"), PROFILE=profile)
    assert (done.returncode, done.stderr) == (0, "")
    order = ("phase4a", "frontier", "scaling", "selection", "confirmation", "transcoder", "ood", "gate", "report")
    found = stages(done)
    assert [s for s in found if s in order] == list(order)
    assert not (tmp_path / "out").exists()
    for line in commands(done).values():
        script = re.search(r"scripts/\S+\.py", line)[0]
        assert (ROOT / script).is_file()
    device = "'cuda'" if profile == "b200" else "'cpu'"
    assert all(device in line for line in commands(done).values() if "--device" in line)


def test_paths_go_from_stage_to_stage(tmp_path):
    out = tmp_path / "out"
    found = commands(queue("--dry-run", OUTPUT=str(out)))
    for earlier, later in (
        ("frontier", "selection"),
        ("scaling", "selection"),
        ("selection", "confirmation"),
        ("selection", "gate"),
        ("confirmation", "gate"),
        ("confirmation", "ood"),
        ("phase4a", "gate"),
        ("random_model", "gate"),
        ("transcoder", "gate"),
        ("ood", "gate"),
    ):
        folder = re.search(r"'--output-dir' '([^']+)'", found[earlier])[1]
        assert f"'{folder}/results.json'" in found[later], (earlier, later)


def test_variables_reach_the_stages(tmp_path):
    baseline_map = tmp_path / "map.json"
    baseline_map.write_text("{}")
    found = commands(
        queue(
            "--dry-run",
            OUTPUT=str(tmp_path),
            SEEDS="1,2,3,4,5",
            MIN_SAEBENCH_DELTA="0.01",
            CEBENCH_BASELINE_MAP=str(baseline_map),
            CEBENCH_REPO="docs",
            SAEBENCH_DATASETS="92_glue_sst2",
            EXECUTOR="ray",
            CEBENCH_STORIES="GulkoA/contrastive-stories-v3",
        )
    )
    assert "'1,2,3,4,5'" in found["phase4a"]
    assert "'--min-saebench-delta' '0.01'" in found["gate"]
    for stage in ("frontier", "scaling", "confirmation"):
        assert f"'{baseline_map}'" in found[stage]
        assert "'docs'" in found[stage]
        assert "'GulkoA/contrastive-stories-v3'" in found[stage]
    assert "'92_glue_sst2'" in found["frontier"]
    assert "'ray'" in found["scaling"]


def test_the_text_reaches_all_that_harvest(tmp_path):
    found = commands(queue("--dry-run", OUTPUT=str(tmp_path), TEXT="a file.jsonl?column=body", SUBJECT="a/model"))
    for stage in ("harvest", "phase4a_lm", "benchmarks", "frontier", "scaling"):
        assert "'--text' 'a file.jsonl?column=body'" in found[stage]
        assert "'a/model'" in found[stage]
    packaged = commands(queue("--dry-run", OUTPUT=str(tmp_path)))
    assert packaged == commands(queue("--dry-run", OUTPUT=str(tmp_path), TEXT="packaged", SUBJECT="husai-tiny"))
    assert not any("--text" in line for line in packaged.values())


def test_the_commands_for_a_gpu_are_what_the_scripts_take(tmp_path, monkeypatch):
    found = commands(queue("--dry-run", OUTPUT=str(tmp_path), PROFILE="b200"))
    assert "'--text' 'monology/pile-uncopyrighted'" in found["frontier"]
    assert "'pythia-70m-deduped'" in found["frontier"]
    parsed = 0
    monkeypatch.chdir(ROOT)
    for line in found.values():
        _, script, *arguments = shlex.split(line)
        if (parse := runpy.run_path(script).get("parse")) is not None:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            parse()
            parsed += 1
    assert parsed > 15


@pytest.mark.nightly
def test_the_whole_queue_on_a_folder_and_a_text_of_ones_own(tmp_path):
    """A GPT-NeoX model that has learned nothing: every stage runs, and the gate is not passed."""
    texts = [f"Message {i}: {t}" for i, t in enumerate(few_texts().train * 10)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    folder = save_miniature(tmp_path / "model", texts[:600])
    named = {"SUBJECT": str(folder), "TEXT": f"{path}?column=body", "OUTPUT": str(tmp_path / "out")}
    environment = os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}", "PROFILE": "smoke"} | named
    done = processes.run(["bash", QUEUE], 1100, check=False, env=environment | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed: " not in done.stdout
    confirmed = json.loads((tmp_path / "out/experiments/candidate_confirmation/results.json").read_text())
    assert confirmed["bank"]["recipe"]["text"] == named["TEXT"]
    for stage in ("random_model_stress", "transcoder_stress", "ood_stress", "feature_reliability"):
        assert json.loads((tmp_path / f"out/experiments/{stage}/results.json").read_text())["text"] == named["TEXT"]


def test_from_and_only():
    assert stages(queue("--dry-run", "--from", "gate"))[0] == "gate"
    assert stages(queue("--dry-run", "--only", "ood")) == ["ood"]


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (["--only", "nothing"], {}, "--only nothing: "),
        (["--from"], {}, "--from : "),
        (["--only", "ood gate"], {}, "--only ood gate: "),
        ([], {"SEEDS": "1,2"}, "SEEDS=1,2: "),
        (["--only", "gate", "--only", "ood"], {}, "--only ood: .*--from"),
        ([], {"HOOK": "a\tb"}, ".*HOOK or TEXT: "),
        ([], {"CEBENCH_STORIES": "nowhere/stories"}, "CEBENCH_STORIES=nowhere/stories: "),
        ([], {"SEEDS": "1,02,3,2"}, "SEEDS=1,02,3,2: "),
        ([], {"MIN_CEBENCH_DELTA": "much"}, "MIN_CEBENCH_DELTA=much: "),
        ([], {"CEBENCH_BASELINE_MAP": "none.json"}, "CEBENCH_BASELINE_MAP=none.json: "),
        ([], {"SUBJECT": "a\nb"}, ".*SUBJECT, "),
        ([], {"PATH": "/usr/bin:/bin"}, "python .*make setup"),
        ([], {"EXECUTOR": "slurm"}, "EXECUTOR=slurm: "),
        (["--fast"], {}, "--fast: "),
        ([], {"OUTPUT": "/proc/nothing"}, "OUTPUT=/proc/nothing: "),
        ([], {"PROFILE": "huge"}, "PROFILE=huge: "),
    ],
)
def test_bad_usage_is_one_line(tmp_path, arguments, variables, named):
    done = queue(*arguments, **{"OUTPUT": str(tmp_path)} | variables)
    assert done.returncode == 2
    assert re.match(f"error: {named}", done.stderr)
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """(output folder, what was printed) of a queue that ran the gate alone, which has no evidence."""
    out = tmp_path_factory.mktemp("gated")
    return out, queue("--only", "gate", OUTPUT=str(out))


def copied(out, target):
    """A copy of an output folder, whose manifest names the copy."""
    shutil.copytree(out, target, dirs_exist_ok=True)
    manifest = target / "queue/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(out), str(target)))
    return target


def test_a_stage_is_noted_and_a_failed_one_named(tmp_path):
    """The outcome of an earlier run of the failed stage is set aside."""
    folder = tmp_path / "experiments/candidate_selection"
    folder.mkdir(parents=True)
    earlier = "results.json", "summary.md", "release_policy.json", "release_policy.md"
    for name in earlier:
        (folder / name).write_text("{}")
    done = queue("--only", "environment", OUTPUT=str(tmp_path))
    assert "torch" in done.stdout
    failed = queue("--only", "selection", OUTPUT=str(tmp_path))
    assert failed.returncode == 2
    assert re.search(r"^failed: selection .*\b2\b", failed.stdout, re.M)
    noted = {s["stage"]: s for s in json.loads((tmp_path / "queue/manifest.json").read_text())["stages"]}
    assert {name: s["return_code"] for name, s in noted.items()} == {"environment": 0, "selection": 2}
    assert "select_release_candidate.py" in noted["selection"]["command"]
    assert not any(name.endswith("/results.json") for name in noted["selection"]["files"])
    assert {p.name for p in folder.iterdir()} >= {f"{name}.stale" for name in earlier}
    assert not any((folder / name).exists() for name in earlier)


def test_an_earlier_report_is_set_aside_where_none_can_be_made(tmp_path, gated):
    (tmp_path / "report.html").write_text("of an earlier run")
    done = queue("--only", "report", OUTPUT=str(tmp_path))
    assert done.returncode == 2
    assert re.search(r"^failed: report\b", done.stdout, re.M)
    assert [p.name for p in tmp_path.glob("report*")] == ["report.html.stale"]
    copied(gated[0], tmp_path)
    assert queue("--only", "report", OUTPUT=str(tmp_path)).returncode == 0
    assert [p.name for p in tmp_path.glob("report*")] == ["report.html"]


def test_a_phase_that_leaves_no_results_has_failed_whatever_its_exit_code(tmp_path):
    """A python that does nothing but the manifest."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(
        f'#!/bin/bash\n[[ "$*" == *queue_manifest.py* || $1 == -c ]] || exit 0\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUTPUT": str(tmp_path / "out")}
    done = processes.run(["bash", QUEUE, "--only", "ablations"], 120, check=False, env=environment)
    assert done.returncode == 2
    assert re.search(r"^failed: ablations .*\b0\b", done.stdout, re.M)


def test_what_the_environment_check_refuses_ends_the_queue(tmp_path):
    done = queue(OUTPUT=str(tmp_path), SAEBENCH_DATASETS="nonsense")
    assert done.returncode == 2
    assert stages(done) == ["environment"]
    assert "nonsense" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", ["--only", "--from"])
@pytest.mark.parametrize("send", [lambda pid: os.kill(pid, signal.SIGTERM), lambda pid: os.killpg(pid, signal.SIGINT)])
def test_a_signal_ends_the_stage_in_order(tmp_path, send, part):
    """To the queue alone, as a service manager sends it, or Ctrl-C to all of it; the same command can then resume.

    `--only` runs the stage by itself, `--from` in a child of the process that imported the libraries.
    """
    environment = os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}", "OUTPUT": str(tmp_path)}
    command = ["bash", QUEUE, part, "subject"]
    process = processes.start(command, env=environment, stdout=subprocess.DEVNULL)
    for line in process.stderr:
        if "training" in line:
            break
    send(process.pid)
    _, said = processes.end(process, 60)
    assert process.returncode == 130
    assert re.search(r"^interrupted .*\bsubject: ", said, re.M)
    (noted,) = json.loads((tmp_path / "queue/manifest.json").read_text())["stages"]
    assert noted["return_code"] == 130
    with open(tmp_path / "queue/.lock") as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing goes on


def test_part_of_the_stages_says_what_does_not_stand(tmp_path, gated):
    copied(gated[0], tmp_path)
    decision = tmp_path / "experiments/release_gate/release_policy.json"
    decision.write_text("{}")
    done = queue("--only", "environment", OUTPUT=str(tmp_path))
    assert f"gate: {decision} " in done.stderr


def test_help_says_what_the_variables_are():
    done = queue("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in ("PROFILE=", "SEEDS=", "--only STAGE", "CEBENCH_BASELINE_MAP="))


def test_the_gate_without_evidence_fails_closed(gated):
    out, done = gated
    assert done.returncode == 1
    assert str(out / "experiments/release_gate/release_policy.md") in done.stdout
    decision = json.loads((out / "experiments/release_gate/release_policy.json").read_text())
    assert decision["pass_all"] is False
    assert {g["status"] for g in decision["gates"]} == {"MISSING"}


def test_a_second_queue_on_one_output_is_refused(tmp_path):
    (tmp_path / "queue").mkdir()
    with open(tmp_path / "queue/.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        done = queue("--only", "environment", OUTPUT=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: OUTPUT={tmp_path}: ")


# ---------------------------------------------------------------------------------------------------------------------
# What stands


SCRIPT = """
from pathlib import Path
from husai.evals.flags import EvalParser
from husai.evals.inputs import by_baseline_map
from husai.runs.inputs import not_at_all

def parse():
    p = EvalParser("A stage.")
    p.add_argument("--given", type=Path)
    p.add_argument("--map", type=Path, counts=by_baseline_map)
    p.add_argument("--output-dir", type=Path, counts=not_at_all)
    p.add_model_name()
    return p.parse_args()
"""


class Stages:
    """A queue of stages that leave a file each."""

    def __init__(self, root, run_script):
        self.root, self.run_script = root / "out", run_script
        self.script = root / "stage.py"
        self.script.write_text(SCRIPT)
        self.outside = root / "mine.json"
        self.outside.write_text("{}")
        self.commands = {"environment": ["true"]}
        self.record("environment", "-")

    def path(self, name):
        return self.root / "experiments" / name / "results.json"

    def call(self, *arguments, stdin=""):
        """(exit code, stdout, stderr)"""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            return self.run_script(MANIFEST, *arguments)

    def record(self, name, place, code=0):
        self.note(name, place, code, self.inputs(name, place))

    def inputs(self, name, place):
        code, out, err = self.call("inputs", self.root / "queue/manifest.json", place, "--", *self.commands[name])
        assert code == 0, err
        return out.strip()

    def note(self, name, place, code, before):
        about = place, "smoke", name, code, 1, before
        code, _, err = self.call("record", self.root / "queue/manifest.json", *about, "--", *self.commands[name])
        assert code == 0, err

    def add(self, name, code=0, *more):
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        self.path(name).write_text(name)
        self.commands[name] = ["python", str(self.script), *map(str, more)]
        self.record(name, self.path(name).parent, code)

    def finished(self):
        lines = [f"== {name}\n{' '.join(map(shlex.quote, c))}\n" for name, c in self.commands.items()]
        code, out, err = self.call(
            "finished", self.root / "queue" / "manifest.json", "--always", *ALWAYS, stdin="\n".join(lines)
        )
        assert code == 0, err
        return out.splitlines(), err


@pytest.fixture
def queued(tmp_path, run_script):
    found = Stages(tmp_path, run_script)
    found.add("first")
    found.add("second", 1, "--given", found.outside)
    found.add("third")
    return found


def test_what_is_as_it_was_stands_with_its_exit_code(queued):
    assert queued.finished() == (["first 0", "second 1", "third 0"], "")


def test_what_was_changed_or_is_gone_is_named_and_nothing_after_it_stands(queued):
    queued.path("second").write_text("another")
    queued.path("third").unlink()
    stands, said = queued.finished()
    assert stands == ["first 0"]
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["second:", str(queued.path("second"))],
        ["third:", str(queued.path("third"))],
    ]


def test_gate_and_report_are_made_each_time_and_hold_up_nothing(queued):
    queued.add("gate", 1)
    queued.add("later")
    assert queued.finished() == (["first 0", "second 1", "third 0", "later 0"], "")
    queued.record("gate", queued.path("gate").parent, 0)  # later than what comes after it
    queued.path("gate").write_text("another")
    stands, said = queued.finished()
    assert stands == ["first 0", "second 1", "third 0", "later 0"]
    assert [line.split()[:2] for line in said.splitlines()] == [["gate:", str(queued.path("gate"))]]


@pytest.mark.parametrize("place", ["mine", "experiments", "experiments/of_my_own", "experiments/first/mine"])
def test_a_file_counts_wherever_it_lies_and_with_what_it_names(queued, place):
    """Also where a stage leaves its own files."""
    below = queued.root / place
    below.mkdir(exist_ok=True)
    (below / "map.json").write_text('{"hook": "summary.json"}')
    for changed in (below / "summary.json", below / "map.json"):
        (below / "summary.json").write_text("{}")
        queued.add("third", 0, "--map", below / "map.json")
        assert queued.finished()[0][-1] == "third 0"
        changed.write_text('{"other": 1}')
        assert queued.finished()[0][-1] == "second 1"


def test_each_argument_counts_as_its_flag_says(queued):
    """The output folder does not count, a subject by its weights, an argument that the script refuses not at all."""
    subject = queued.root.parent / "subject"
    subject.mkdir()
    for content, stands in (("a", "third 0"), ("b", "second 1")):
        (subject / "model.safetensors").write_text(content)
        if content == "a":
            queued.add("third", 0, "--model-name", subject, "--output-dir", queued.path("third").parent)
        assert queued.finished()[0][-1] == stands
    (queued.path("third").parent / ".hidden").write_text("")
    queued.add("third", 0, "--no-such-flag", "x" * 300)
    assert queued.finished()[0][-1] == "third 0"


def test_what_was_changed_while_a_stage_ran_does_not_stand(queued):
    queued.add("third", 0, "--given", queued.outside)
    before = queued.inputs("third", queued.path("third").parent)
    queued.outside.write_text("[]")
    queued.note("third", queued.path("third").parent, 0, before)
    queued.outside.write_text("{}")
    assert queued.finished()[0] == ["first 0", "second 1"]


def test_the_order_is_that_in_which_they_ran_whatever_the_clock_said(queued):
    manifest = queued.root / "queue/manifest.json"
    noted = json.loads(manifest.read_text())
    for place, stage in enumerate(noted["stages"]):
        stage["ended_utc"] = f"2026-01-0{9 - place}T00:00:00.000000+00:00"
    manifest.write_text(json.dumps(noted))
    assert queued.finished() == (["first 0", "second 1", "third 0"], "")


def test_a_stage_that_left_nothing_does_not_stand(queued):
    queued.record("second", queued.root / "nothing")
    assert queued.finished()[0] == ["first 0"]


def test_another_command_or_another_input_does_not_stand(queued):
    queued.outside.write_text("[]")
    stands, said = queued.finished()
    assert stands == ["first 0"]
    assert said.startswith("second: ")
    changed_input = said.splitlines()[0].removeprefix("second: ")
    queued.commands["first"] += ["--given", str(queued.outside)]
    stands, said = queued.finished()
    assert stands == []
    assert said.startswith("first: ")
    assert not said.startswith(f"first: {changed_input}"), "another command is told from another input"


def test_a_failed_or_interrupted_stage_does_not_stand(queued):
    for code in (2, 130):
        queued.record("second", queued.path("second").parent, code)
        assert queued.finished()[0] == ["first 0"]
    queued.path("second").unlink()  # 1 without results is a failure, with results a finding
    queued.record("second", queued.path("second").parent, 1)
    stands, said = queued.finished()
    assert stands == ["first 0"]
    assert re.match(r"second: .*\b1\n", said)


def test_what_comes_after_a_stage_that_was_run_again_does_not_stand(queued):
    """`--only STAGE` with another setting: what had been made of its old results is no longer true."""
    queued.add("second", 0, "--given", queued.outside)
    stands, said = queued.finished()
    assert stands == ["first 0", "second 0"]
    assert [line.split()[0] for line in said.splitlines()] == ["third:"]


def test_a_stage_that_was_never_run_stands_in_the_way_of_the_later_ones(queued):
    queued.commands = {"environment": ["true"], "new": ["python"], **queued.commands}
    assert queued.finished()[0] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["other", "m.json"],
        ["finished"],
        ["finished", "m.json", "more"],
        ["record", "m.json"],
        ["inputs", "m.json", "-"],
        ["record", "m.json", "-", *"ab", "x", "1", "", "--", "true"],
        ["record", "m.json", "-", *"ab", "0", "1", ""],
    ],
)
def test_bad_usage_of_the_manifest_is_one_line(queued, arguments):
    code, _, err = queued.call(*arguments)
    assert code == 2
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{}", '{"stages": [{}]}', '{"stages": [1]}', "[]"])
def test_a_damaged_manifest_is_named_and_nothing_stands(queued, content):
    (queued.root / "queue/manifest.json").write_text(content)
    stands, said = queued.finished()
    assert stands == []
    assert f"{queued.root / 'queue/manifest.json'} is" in said
    queued.record("first", queued.path("first").parent)
    assert queued.finished()[0] == []
