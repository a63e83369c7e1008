"""SIGKILL at twenty random moments of the queue: the same command resumes, and ends with the same bytes."""

import json
import random
import time

from harness import Queue, kill

KILLS = 20


def moments(queue: Queue, n: int) -> list[tuple[str, float]]:
    """(stage, seconds after it began), n of them, uniform over the time that the undisturbed queue took."""
    stages = json.loads((queue.out / "queue/manifest.json").read_text())["stages"]
    rng = random.Random(0)
    found = []
    for at in sorted(rng.uniform(0, sum(s["seconds"] for s in stages)) for _ in range(n)):
        for stage in stages:
            if at < stage["seconds"]:
                found.append((stage["stage"], at))
                break
            at -= stage["seconds"]
    return found


def test_killed_at_random_moments_nothing_is_lost(undisturbed, tmp_path):
    queue = Queue(tmp_path / "killed", undisturbed.subject)
    killed, finished, hit = 0, {}, set()
    for stage, seconds in moments(undisturbed, KILLS):
        process = queue.start()
        reached = queue.wait_for(process, stage)
        time.sleep(seconds)
        killed += process.poll() is None
        kill(process)
        assert reached, queue.said()
        hit.update(queue.stages()[-1:])
        now = queue.finished()
        assert {name: now.get(name) for name in finished} == finished, f"lost before or in {stage}"
        finished = now
    assert finished
    assert len(hit) >= 6, f"kills in {hit} alone"
    assert killed >= KILLS * 3 // 4  # a stage whose cells were finished may have ended earlier this time
    code, said = queue.run()
    assert code == 1, said
    assert "failed:" not in said
    now = queue.finished()
    assert {name: now[name] for name in finished} == finished
    assert queue.unlike(undisturbed) == []
    repeat, _ = queue.run()
    assert repeat == code
    assert queue.stages() == ["environment", "gate", "audit", "report"]
