"""Worker processes that grade, each with a time and a memory limit: `shared_pool().grade(requests, timeout)`.

Math-verify can loop for ever, fill the memory or crash on what a model writes, and no thread can be stopped from
outside, so grading runs in processes that can be killed. They are started on first use as fresh interpreters of
`worker.py`, which loads neither torch nor trl nor vllm: safe from a process with CUDA, engines and threads.

A worker works through a few requests per message. Its own kernel alarm ends it when one request takes longer than the
limit, counted from the start of the work on that request, never from its queueing; should the alarm fail, the pool
ends it half a second later. What ends a worker costs the request it was at; its other requests go back to the queue.
"""

import atexit
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from tqdm.auto import tqdm


RIGHT, WRONG, TIMEOUT, KILLED = "right", "wrong", "timeout", "killed"

MAX_WORKERS = 4
START_SECONDS = 120.0  # imports on a machine under load
MAX_FAILED_STARTS = 3  # in a row
CHUNK_REQUESTS = 16
CHUNK_BYTES = 60_000  # less than a pipe holds (64 KiB), so that writing to an idle worker never blocks
ALARM_GRACE_SECONDS = 0.5
LEAST_LIMIT_SECONDS = 0.05  # with less left no work is begun
_WORKER = str(Path(__file__).with_name("worker.py"))


def _no_bar(total: int) -> tqdm:
    return tqdm(total=total, disable=True)


# Makes the bar of a batch, given its `total`; of one thread, so that none is shown from another.
_bar: ContextVar[Callable[..., tqdm]] = ContextVar("bar", default=_no_bar)


@contextmanager
def showing_grading(bar: Callable[..., tqdm]) -> Iterator[None]:
    """Context in which each batch that this thread has graded shows a bar, made for its `total`."""
    token = _bar.set(bar)
    try:
        yield
    finally:
        _bar.reset(token)


class Worker:
    """One grading process and the requests (indices into the batch) that it holds, the first of which it is at."""

    def __init__(self):
        # -P: the package's folder, where the script lies, must not come before installed packages.
        self.process = subprocess.Popen(
            [sys.executable, "-P", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # nothing half-written for a forked child to flush
        )
        self.assigned: deque[int] = deque()
        self.ready = False
        self.leaving = False
        self.limit = 0.0
        self.deadline = time.monotonic() + START_SECONDS
        self._unread = b""

    def send(self, chunk: dict[int, bytes], limit: float):
        self.assigned.extend(chunk)
        self.limit = limit
        self.deadline = time.monotonic() + limit + ALARM_GRACE_SECONDS
        message = memoryview(b"".join(chunk.values()))
        try:
            while message:
                message = message[self.process.stdin.write(message) :]
        except OSError:
            self.leaving = True  # it died while idle; the end of its output returns the chunk to the queue

    def receive(self) -> list[dict] | None:
        """Complete replies that have arrived; None at the end of the worker's output."""
        data = os.read(self.process.stdout.fileno(), 65536)
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        self.deadline = time.monotonic() + self.limit + ALARM_GRACE_SECONDS
        return [json.loads(line) for line in lines]

    def end(self) -> int:
        """Kill the process, if it still runs, and return its exit status."""
        self.process.kill()
        status = self.process.wait()
        self.forget()
        return status

    def forget(self):
        """Close this process's ends of the pipes."""
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()


class GradingPool:
    """Grades batches on up to `size` worker processes, one batch at a time; callable from any thread."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._failed_starts = 0

    def grade(self, requests: list[dict], timeout: float, within: float | None = None) -> list[str]:
        """RIGHT, WRONG, TIMEOUT or KILLED per request.

        Args:
            requests: as `worker` takes them, without "limit".
            timeout: seconds of work on one request.
            within: of a single request, seconds from now after which the call ends (`ALARM_GRACE_SECONDS` later at
                the most), waiting for workers included: its limit is what is left, and TIMEOUT where nothing is.

        Raises:
            RuntimeError: workers cannot be started.
        """
        end = None if within is None else time.monotonic() + within
        if not self._lock.acquire(timeout=-1 if within is None else within / 4):
            spare = GradingPool(1)  # another thread's batch holds the workers of this pool
            try:
                return spare.grade(requests, timeout, end - time.monotonic())
            finally:
                spare.close()
        try:
            return self._grade(requests, timeout, end)
        except BaseException:
            self._end_workers()  # they may hold requests of this batch
            raise
        finally:
            self._lock.release()

    def _grade(self, requests: list[dict], timeout: float, end: float | None) -> list[str]:
        results: list[str | None] = [None] * len(requests)
        queue = deque(range(len(requests)))
        with _bar.get()(total=len(requests)) as bar:
            while None in results:
                left = math.inf if end is None else end - time.monotonic()
                if left < LEAST_LIMIT_SECONDS:
                    for index in queue:
                        results[index] = TIMEOUT
                    queue.clear()
                self._start_workers(len(queue))
                self._hand_out(queue, requests, min(timeout, left))
                if None in results:
                    self._collect(queue, results, end)
                bar.update(len(results) - results.count(None) - bar.n)
        return results

    def close(self):
        """End the workers; a later batch starts new ones."""
        with self._lock:
            self._end_workers()

    def _start_workers(self, waiting: int):
        starting = sum(not worker.ready for worker in self.workers)
        free = sum(worker.ready and not worker.assigned and not worker.leaving for worker in self.workers)
        for _ in range(min(self.size - len(self.workers), waiting - starting - free)):
            worker = Worker()
            self.workers.append(worker)
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _hand_out(self, queue: deque[int], requests: list[dict], limit: float):
        for worker in self.workers:
            if not queue:
                return
            if not worker.ready or worker.assigned or worker.leaving:
                continue
            share = min(CHUNK_REQUESTS, -(-len(queue) // (2 * len(self.workers))))
            chunk, size = {}, 0
            while queue and len(chunk) < share:
                message = json.dumps(requests[queue[0]] | {"limit": limit}, ensure_ascii=False)
                line = message.encode("utf-8", "surrogatepass") + b"\n"
                if chunk and size + len(line) > CHUNK_BYTES:
                    break
                chunk[queue.popleft()] = line
                size += len(line)
            worker.send(chunk, limit)

    def _collect(self, queue: deque[int], results: list[str | None], end: float | None):
        """Wait for something to happen, no longer than to the end while requests wait, and book it."""
        busy = [worker for worker in self.workers if worker.assigned or worker.leaving or not worker.ready]
        deadlines = [worker.deadline for worker in busy] + [end] * (end is not None and bool(queue))
        patience = min(deadlines) - time.monotonic()
        for key, _ in self._selector.select(max(0.0, patience)):
            worker = key.data
            replies = worker.receive()
            if replies is None:
                self._bury(worker, queue, results)
                continue
            for reply in replies:
                if "ready" in reply:
                    worker.ready, self._failed_starts = True, 0
                    continue
                results[worker.assigned.popleft()] = RIGHT if reply["verdict"] else WRONG
                worker.leaving = reply["retire"]
        for worker in busy:
            if worker in self.workers and time.monotonic() > worker.deadline:
                self._bury(worker, queue, results, overdue=True)

    def _bury(self, worker: Worker, queue: deque[int], results: list[str | None], overdue: bool = False):
        self._selector.unregister(worker.process.stdout)
        self.workers.remove(worker)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self._failed_starts = 0
                worker.process.kill()
                reason = worker.process.stderr.read().decode(errors="replace").strip()[-2000:]
                worker.end()
                raise RuntimeError(
                    f"grading workers cannot be started ({MAX_FAILED_STARTS} attempts with {sys.executable}); "
                    f"is math-verify installed there? The last one ended with: {reason or 'no message'}"
                )
        # An exit status of its own is awaited only where the output has ended, that is, where the process has too.
        status = worker.end() if overdue else _exit_status(worker)
        if worker.assigned and not worker.leaving:
            timed_out = overdue or status == -signal.SIGALRM
            results[worker.assigned.popleft()] = TIMEOUT if timed_out else KILLED
        queue.extendleft(reversed(worker.assigned))

    def _end_workers(self):
        for worker in self.workers:
            self._selector.unregister(worker.process.stdout)
            worker.end()
        self.workers.clear()


def _exit_status(worker: Worker) -> int:
    try:
        status = worker.process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return worker.end()
    worker.forget()
    return status


_pool: GradingPool | None = None
_pool_lock = threading.Lock()


def shared_pool() -> GradingPool:
    """The pool of this process: as many workers as it has CPUs, 4 at most, each started when first needed."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = GradingPool(min(len(os.sched_getaffinity(0)), MAX_WORKERS))
        return _pool


def _close_at_exit():
    if _pool is not None:
        for worker in _pool.workers:  # no lock: a daemon thread that holds it no longer runs
            worker.end()
        _pool.workers.clear()


def _leave_to_parent():
    """After a fork the workers are the parent's: drop them, and the child's copies of their pipes."""
    global _pool, _pool_lock
    if _pool is not None:
        _pool._selector.close()
        for worker in _pool.workers:
            worker.process.returncode = 0  # not this process's child to wait for
            worker.forget()
    _pool, _pool_lock = None, threading.Lock()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_leave_to_parent)
