"""A disk that fills up in the middle of the queue, and one that is too small from the start.

On the full one the stages from there on fail by name, without a traceback, and nothing finished is lost; with space
again the same command ends with the bytes of an undisturbed run. On the small one nothing is run.
"""

import errno
import json
import shutil

import pytest
from harness import PATIENCE, Queue, kill

import processes

FROM = "random_model"


@pytest.fixture
def disk(tmp_path):
    """`disk(megabytes)`: a folder on a file system of its own."""
    mounted = []

    def make(megabytes: int):
        folder = tmp_path / f"disk{megabytes}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        done = processes.run(command, 30, check=False)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        processes.run(["umount", "-l", folder], 30)


def fill(path):
    """As large a file as the disk takes."""
    with open(path, "wb", buffering=0) as f:
        for size in (1 << 20, 1 << 12):
            try:
                while f.write(bytes(size)) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def test_too_small_a_disk_is_refused_before_anything_runs(disk, subject, tmp_path):
    queue = Queue(disk(50) / "out", subject, tmp_path / "small.log")
    code, said = queue.run()
    assert code == 2
    assert said.startswith(f"error: OUTPUT={queue.out}: ")
    assert said.endswith("MB free, 300 expected\n")
    assert queue.stages() == []


@pytest.mark.nightly
def test_a_disk_that_fills_up_costs_nothing_that_was_finished(disk, undisturbed, tmp_path):
    """Everything up to the stress tests is there; the disk is full as the first of them begins."""
    queue = undisturbed.copied_to(disk(600) / "out", tmp_path / "full.log")
    manifest = queue.out / "queue/manifest.json"
    noted = json.loads(manifest.read_text())
    names = [s["stage"] for s in noted["stages"]]
    assert names.index(FROM) > names.index("confirmation")
    for stage in noted["stages"][names.index(FROM) :]:
        if stage["place"].startswith(str(queue.out / "experiments")):
            shutil.rmtree(stage["place"])
    noted["stages"] = noted["stages"][: names.index(FROM)]
    manifest.write_text(json.dumps(noted))
    before = queue.finished()
    assert before

    process = queue.start()
    try:
        assert queue.wait_for(process, FROM), queue.said()
        filler = queue.out.parent / "filler"
        fill(filler)
        processes.end(process, PATIENCE)
    finally:
        kill(process)
    said = queue.said()
    assert process.returncode == 2, said
    assert f"failed: {FROM}" in said
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert queue.stages()[:2] == ["environment", FROM], "what comes before stands"
    now = queue.finished()
    assert {name: now.get(name) for name in before} == before

    filler.unlink()
    code, said = queue.run()
    assert code == 1, said
    assert "failed:" not in said
    assert queue.unlike(undisturbed) == []
