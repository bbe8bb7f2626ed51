"""Calling a task's score(): its form is checked once before a run, and a response that breaks it or keeps it
busy costs one answer rather than the run. Wherever answers are counted, only a reward of 1.0 is right."""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, suppress
from copy import deepcopy
from functools import cache
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from infra.config import UserError

FORM = "score() must return (reward, verdict): a finite number, which is 1.0 if right, and a short string"
LATE = (0.0, "timeout", "took too long")  # reward, verdict, what went wrong
SIGNALS = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FORK, FORKING = multiprocessing.get_context("fork"), threading.Lock()


class TimeUp(BaseException):
    """Raised inside a score() that takes too long; no Exception, so that the checker does not catch it."""


def check_task(task: ModuleType, rows: Sequence[dict]) -> None:
    """UserError unless score() returns what it must for the reference answers of three rows; a note if it
    counts none of them as right."""
    judged = judge(task, ["".join(r["hint"]) + r["answer"] for r in rows[:3]], [r["truth"] for r in rows[:3]])
    rewards = [reward for (reward, _), row in zip(judged, rows, strict=False) if row["answer"]]
    if rewards and 1.0 not in rewards:
        seen = f"score() gives the reference answers of its first rows the rewards {rewards}"
        print(f"note: task {task.__name__}: {seen}; only 1.0 counts as right", file=sys.stderr)


def judge(
    task: ModuleType, responses: Sequence[str], truths: Sequence[Any],
    timeout: float = 10.0, workers: int = 0, on_error: str = "stop",
) -> list[tuple[float, str]]:  # fmt: skip
    """(reward, verdict) of each response: in this process, or in others, so many `workers` at a time.

    timeout: seconds for an answer (0: no limit), which then gets (0.0, "timeout"). In this process that works
    in the main thread alone and does not interrupt C code; another one is killed. on_error: a score() that
    raises is a UserError ("stop") or gives (0.0, "error: ...") ("zero"). A result of another form is always a
    UserError."""
    jobs = [(task, *job, timeout) for job in zip(responses, truths, strict=True)]
    results, failed = [], {}
    outcomes = _in_processes(jobs, workers) if workers else map(_attempt, jobs)
    for i, (reward, verdict, error) in enumerate(outcomes):
        if error == "has another form" or error == "raised" and on_error == "stop":
            raise UserError(f"task {task.__name__}, row {i} ({responses[i][-60:]!r}): {verdict}")
        failed.setdefault(error, []).append(i)
        results.append((reward, verdict))
    for error in sorted(failed.keys() - {""}):
        share = f"{len(failed[error])} of {len(jobs)} answers, the first of row {failed[error][0]}"
        limit = f" (time limit: {timeout:g} s)" if error == LATE[2] else ""
        message = f"score() of task {task.__name__} {error} for {share}{limit}: reward 0"
        print(f"warning: {message}", file=sys.stderr)
    return results


def _attempt(job: tuple[ModuleType, str, Any, float]) -> tuple[float, str, str]:
    """(reward, verdict, what went wrong) of a job. The alarm's timer, the signal handlers and the working
    directory are then as they were."""
    task, response, truth, timeout = job
    process, began = os.getpid(), time.monotonic()
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {n: signal.getsignal(n) for n in SIGNALS} if in_main else {}
    left = 0.0
    try:
        if timeout and in_main:
            signal.signal(signal.SIGALRM, _stop)
            left = signal.setitimer(signal.ITIMER_REAL, timeout)[0]
        try:
            with chdir("."):
                reward, verdict = result = task.score(response, deepcopy(truth))  # it may change it
        finally:
            if timeout and in_main:
                signal.setitimer(signal.ITIMER_REAL, 0)
        number = math.nan if isinstance(reward, str) else float(reward)  # of numpy, torch or bool too
        if math.isfinite(number) and isinstance(verdict, str) and len(verdict) <= 200:
            return number, str(verdict).encode("utf-8", "replace").decode(), ""
        return 0.0, f"{FORM}; here they are {str(result)[:80]}", "has another form"
    except TimeUp:
        return LATE
    except (Exception, SystemExit) as e:
        ours = e.__traceback__.tb_next is None  # the result could not be unpacked or converted
        what = f"{FORM};" if ours else "error: score() raised"
        return 0.0, f"{what} {type(e).__name__}: {e}"[:300], "has another form" if ours else "raised"
    finally:
        if os.getpid() != process:
            os._exit(1)  # a process that score() forked must not go on as the caller
        for n, handler in handlers.items():
            if handler is not None:  # None: set by other than Python
                signal.signal(n, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - began)))


def _stop(*_: Any) -> None:
    raise TimeUp


@cache
def reset_signals_in_children() -> None:
    """Take our signal handlers from every process forked from now on, so that one that a score() starts and
    terminates does end. A trainer with handlers calls this once."""
    os.register_at_fork(after_in_child=_reset_signals)


def _reset_signals() -> None:
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _in_processes(jobs: list[tuple], workers: int) -> Iterator[tuple[float, str, str]]:
    """_attempt() of each job in a forked process, which is killed with its children when late or done."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(_in_process, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_process(job: tuple) -> tuple[float, str, str]:
    with FORKING:  # so that no other process inherits, and keeps open, this end of the pipe
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_send, args=(theirs, job))
        process.start()
        theirs.close()
    try:
        return ours.recv() if ours.poll(job[-1] + 1 if job[-1] else None) else LATE
    except EOFError:
        return 0.0, "error: score() ended its process", "raised"
    finally:
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def _send(connection: Connection, job: tuple) -> None:
    os.setpgrp()
    _reset_signals()
    connection.send(_attempt(job))
