"""The grading processes: limits on time and memory, workers that die, threads and forks."""

import io
import os
import signal
import threading

import pytest
from tqdm import tqdm

from attn_trainers.rewards import math as rewards
from attn_trainers.rewards import pool as grading
from attn_trainers.rewards import worker as grading_worker
from attn_trainers.rewards.math import math_accuracy, math_accuracy_reward
from attn_trainers.rewards.pool import KILLED, RIGHT, TIMEOUT, WRONG, GradingPool, shared_pool, showing_grading


EASY = {"pairs": [["\\sqrt{8}", "2\\sqrt{2}"]]}
ENDLESS = {"pairs": [["17", "10^{10^{10^{10}}}"]]}


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


@pytest.fixture
def pool():
    pool = GradingPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("answer", ["10^{10^{10^{10}}}", "999999999!", "2^{2^{40}}", "\\prod_{n=1}^{10^{9}} (n^2+1)"])
def test_endless_answers_are_counted_as_timeouts(monkeypatch, answer):
    monkeypatch.setattr(rewards, "TIMEOUT_SECONDS", 1.0)
    metrics = {}
    completions = [boxed(answer), boxed("2\\sqrt{2}"), boxed(answer)]
    golds = ["17+\\sqrt{3}", "\\sqrt{8}", "17+\\sqrt{3}"]
    assert math_accuracy_reward(completions, golds, log_metric=metrics.__setitem__) == [0.0, 1.0, 0.0]
    assert metrics == {"grading/timeouts": 2.0, "grading/kills": 0.0}


def test_a_timeout_costs_one_answer(pool):
    requests = [EASY] * 20 + [ENDLESS] + [EASY] * 20
    assert pool.grade(requests, timeout=1.0) == [RIGHT] * 20 + [TIMEOUT] + [RIGHT] * 20


def test_a_batch_shows_how_much_of_it_is_graded_in_the_thread_that_asked_for_it(pool):
    bars = []

    def bar(total):
        bars.append(tqdm(total=total, file=io.StringIO()))
        return bars[-1]

    with showing_grading(bar):
        other = threading.Thread(target=pool.grade, args=([EASY] * 2, 5.0))
        other.start()
        other.join()
        assert not bars
        pool.grade([EASY] * 20 + [ENDLESS], timeout=1.0)
    pool.grade([EASY], timeout=5.0)
    assert [(bar.n, bar.total) for bar in bars] == [(21, 21)]


def test_a_stopped_worker_is_overdue(pool):
    assert pool.grade([EASY], timeout=5.0) == [RIGHT]
    os.kill(pool.workers[0].process.pid, signal.SIGSTOP)
    assert pool.grade([EASY], timeout=0.5) == [TIMEOUT]
    assert pool.grade([EASY], timeout=5.0) == [RIGHT]


def test_a_killed_worker_costs_one_answer_and_is_replaced(pool):
    assert pool.grade([EASY] * 2, timeout=5.0) == [RIGHT] * 2
    before = {worker.process.pid for worker in pool.workers}
    outcomes = []
    batch = threading.Thread(target=lambda: outcomes.extend(pool.grade([EASY] * 4 + [ENDLESS] + [EASY] * 4, 60.0)))
    batch.start()
    # A worker is at the first of the requests that it holds: wait until one is at the endless request.
    while not (stuck := [w for w in list(pool.workers) if list(w.assigned.copy())[:1] == [4]]) and batch.is_alive():
        batch.join(0.01)
    os.kill(stuck[0].process.pid, signal.SIGKILL)
    batch.join()
    assert outcomes == [RIGHT] * 4 + [KILLED] + [RIGHT] * 4
    assert pool.grade([EASY] * 4, timeout=5.0) == [RIGHT] * 4
    assert stuck[0].process.pid in before
    assert stuck[0].process.pid not in {worker.process.pid for worker in pool.workers}


def test_an_idle_worker_that_was_killed_costs_nothing(pool):
    pool.grade([EASY] * 4, timeout=5.0)
    for worker in pool.workers:
        os.kill(worker.process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)
    assert pool.grade([EASY] * 4, timeout=5.0) == [RIGHT] * 4


def test_memory_is_limited(pool):
    # A matrix of 10^10 entries takes 80 GB as a list: refused by the limit, not by the time.
    huge = {"pairs": [["17", "\\operatorname{zeros}(100000,100000)"]]}
    assert pool.grade([huge], timeout=60.0) == [WRONG]
    pid = pool.workers[0].process.pid
    with open(f"/proc/{pid}/limits") as lines:
        limit = next(int(line.split()[3]) for line in lines if line.startswith("Max address space"))
    with open(f"/proc/{pid}/statm") as statm:
        in_use = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    assert in_use < limit <= in_use + grading_worker.HEADROOM_BYTES


def test_threads_share_the_pool():
    outcomes = {}

    def grade(index: int):
        outcomes[index] = [math_accuracy(boxed(f"{index}\\sqrt{{4}}+x"), f"x+{2 * index + wrong}") for wrong in (0, 1)]

    threads = [threading.Thread(target=grade, args=(index,)) for index in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {index: [1.0, 0.0] for index in range(1, 9)}


def test_a_forked_child_has_workers_of_its_own():
    assert math_accuracy(boxed("2\\sqrt{2}"), "\\sqrt{8}") == 1.0
    before = [worker.process.pid for worker in shared_pool().workers]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            right = math_accuracy(boxed("2\\sqrt{2}"), "\\sqrt{8}") == 1.0
            own = not {worker.process.pid for worker in shared_pool().workers} & set(before)
            shared_pool().close()
            status = 0 if right and own else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert math_accuracy(boxed("2\\sqrt{2}"), "\\sqrt{8}") == 1.0
    assert [worker.process.pid for worker in shared_pool().workers] == before


def test_a_worker_that_takes_too_long_to_start_is_not_waited_for(pool, monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import time; time.sleep(3600)")
    monkeypatch.setattr(grading, "_WORKER", str(script))
    assert pool.grade([EASY], timeout=0.5, within=0.6) == [TIMEOUT]


def test_a_busy_pool_is_not_waited_for(pool):
    with pool._lock:  # another thread grades a batch
        assert pool.grade([EASY], timeout=5.0, within=8.0) == [RIGHT]
        assert pool.grade([ENDLESS], timeout=1.0, within=8.0) == [TIMEOUT]
    assert pool.workers == []


def test_workers_that_cannot_start_are_an_error(pool, monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("raise ImportError('no grader here')")
    monkeypatch.setattr(grading, "_WORKER", str(script))
    with pytest.raises(RuntimeError, match="cannot be started(.|\n)*no grader here"):
        pool.grade([EASY], timeout=1.0)
    monkeypatch.undo()
    assert pool.grade([EASY], timeout=5.0) == [RIGHT]
