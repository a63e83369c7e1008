"""The miniature, and the queue that ran through on it: what the tests here compare with."""

from pathlib import Path

import pytest
from filelock import FileLock
from harness import Queue

from miniature import few_texts, save_miniature


def pytest_collection_modifyitems(items):
    """The longest first: the other worker takes the others."""
    items.sort(key=lambda item: "test_kill" not in item.nodeid)


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """A folder that all workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def subject(shared) -> Path:
    """The miniature: what is tested is what survives, not what it says."""
    folder = shared / "miniature"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            save_miniature(folder, few_texts().train)
    return folder


@pytest.fixture(scope="session")
def undisturbed(shared, subject) -> Queue:
    """The queue that ran through, once for all."""
    queue = Queue(shared / "undisturbed", subject)
    with FileLock(f"{queue.out}.lock"):
        if not (shared / "ran").exists():
            code, said = queue.run()
            assert code == 1, said  # nothing of it holds, and the gate says so
            assert "failed:" not in said, said
            (shared / "ran").touch()
    return queue
