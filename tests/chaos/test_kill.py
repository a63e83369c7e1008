"""SIGKILL in every stage of the queue: the same command resumes, and ends with the same bytes.

20 kills of the queue and all that it has started, in 16 stages, the longer ones twice, at random moments. After each
one every finished cell, subject, store and checkpoint is still the file that it was. The end has the bytes of an
undisturbed run, and a repeat enters only the stages that always run.
"""

import random
import time

from harness import Queue, kill

KILLED = (
    *("subject", "harvest", "phase4a", "phase4a_lm", "ablations", "adaptive_l0", "assignment", "benchmarks"),
    *("frontier", "frontier", "scaling", "selection", "confirmation", "confirmation", "random_model", "random_model"),
    *("transcoder", "transcoder", "ood", "features"),
)
"""Stages after whose start a kill comes; the longer ones twice."""
LONGEST = 2.5  # seconds into a stage; what is shorter is killed in the one after it


def test_killed_at_random_moments_nothing_is_lost(subject, tmp_path, request):
    queue, rng = Queue(tmp_path / "killed", subject), random.Random(0)
    killed, finished, hit = 0, {}, set()
    for stage in KILLED:
        process = queue.start()
        reached = queue.wait_for(process, stage)
        time.sleep(rng.uniform(0, LONGEST))
        killed += process.poll() is None
        kill(process)
        assert reached, queue.said()
        hit.update(queue.stages()[-1:])
        now = queue.finished()
        assert {name: now.get(name) for name in finished} == finished, f"lost before or in {stage}"
        finished = now
    assert finished
    assert len(hit) >= 12, f"kills in {hit} alone"
    assert killed >= len(KILLED) * 3 // 4  # near the end the queue may be through before it is killed
    code, said = queue.run()
    assert code == 1, said
    assert "failed:" not in said
    now = queue.finished()
    assert {name: now[name] for name in finished} == finished
    assert queue.unlike(request.getfixturevalue("undisturbed")) == []
    repeat, _ = queue.run()
    assert repeat == code
    assert queue.stages() == ["environment", "gate", "audit", "report"]
