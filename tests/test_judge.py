"""data/judge.py: own tasks are checked once, and no response can stall or end a run."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from data import judge as module
from data.judge import check_task, judge, reset_signals_in_children
from infra.config import UserError


def task(score):
    made = ModuleType("data.mine")
    made.score = score
    return made


def row(answer="<answer>2</answer>", truth=None):
    return {"prompt": "1+1?", "hint": [], "answer": answer, "truth": truth or {"target": 2}}


def odd(response, truth):
    """A score() that does what the response says."""
    while response == "stuck":
        pass
    while response == "stuck and catches":
        with suppress(Exception):
            time.sleep(0.01)
    if response == "raises":
        return 1 / 0
    if response == "calls sys.exit":
        sys.exit("bye")
    if response == "exits":
        os._exit(3)
    if response == "forks and the child raises":
        pid = os.fork()
        if not pid:
            return 1 / 0
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    if response == "another handler":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(0)
    if response == "another folder":
        os.chdir("/")
    kinds = {"numpy": np.float32(1), "tensor": torch.tensor([0.5]), "bool": np.bool_(True), "int": 0}
    return kinds.get(response, truth), np.str_("a verdict")


class Checker:
    def __call__(self, response, truth):
        return odd(response, truth)


SCORES = [odd, lambda response, truth: odd(response, truth), partial(odd), Checker(), Checker().__call__]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("score", SCORES, ids=["def", "lambda", "partial", "object", "method"])
def test_rewards_are_plain_numbers_in_the_order_of_the_responses(score, workers):
    responses = ["numpy", "x", "tensor", "bool", "int", "another handler", "forks and the child raises"]
    got = judge(task(score), responses, [1, 0.25, 1, 1, 1, 1, 1], workers=workers)
    assert got == [(reward, "a verdict") for reward in (1.0, 0.25, 0.5, 1.0, 0.0, 1.0, 1.0)]
    assert all(type(reward) is float and type(verdict) is str for reward, verdict in got)


def test_a_checker_may_change_its_truth_and_say_half_a_character():
    def score(response, truth):
        truth.pop()
        return float(len(truth)), "\ud83d"

    truth = [1, 2]
    assert judge(task(score), ["a", "b"], [truth, truth]) == [(1.0, "?")] * 2 and truth == [1, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stuck", ["stuck", "stuck and catches"])
def test_a_stuck_checker_costs_one_answer(workers, stuck, capsys):
    got = judge(task(odd), ["x", stuck, "x"], [1.0] * 3, timeout=0.3, workers=workers)
    assert got == [(1.0, "a verdict"), (0.0, "timeout"), (1.0, "a verdict")]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "took too long for 1 of 3 answers, the first of row 1 (time limit: 0.3 s)" in warning


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "response, error", [("raises", "ZeroDivisionError: division"), ("calls sys.exit", "SystemExit: bye")]
)
def test_a_checker_that_raises(response, error, workers, capsys):
    with pytest.raises(UserError, match=rf"task data.mine, row 1 \('{response}'\): .* {error}"):
        judge(task(odd), ["x", response], [1.0] * 2, workers=workers)
    got = judge(task(odd), ["x", response, response], [1.0] * 3, workers=workers, on_error="zero")
    assert got[0][0] == 1.0 and got[1] == got[2] and got[1][0] == 0.0 and got[1][1].startswith("error: ")
    assert "raised for 2 of 3 answers, the first of row 1" in capsys.readouterr().err


def test_a_checker_that_ends_its_process_costs_one_answer():
    got = judge(task(odd), ["exits", "x"], [1.0] * 2, workers=1, on_error="zero")
    assert got == [(0.0, "error: score() ended its process"), (1.0, "a verdict")]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("on_error", ["stop", "zero"])
@pytest.mark.parametrize(
    "result",
    [1.0, None, (1.0,), (float("nan"), "x"), (float("inf"), "x"), ("1.0", "x"), (None, "x"), (1.0, None)]
    + [(1j, "x"), (torch.ones(2), "x"), (1.0, "x" * 1000), (1.0, 2.0, 3.0)],
)  # fmt: skip
def test_another_form_is_refused_in_one_line_that_names_the_reward(result, on_error, workers):
    with pytest.raises(UserError, match=r"task data.mine, row 0 .*must return \(reward, verdict\)") as e:
        judge(task(lambda response, truth: result), ["x"], [1], workers=workers, on_error=on_error)
    assert "\n" not in str(e.value)


def test_handlers_timer_and_folder_are_left_as_they_were():
    def handler(*_):
        pass

    before = {number: signal.signal(number, handler) for number in (signal.SIGALRM, signal.SIGTERM)}
    responses, folder = ["x", "stuck", "raises", "another handler", "another folder"], os.getcwd()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000)
        judge(task(odd), responses, [1.0] * 5, timeout=0.1, on_error="zero")
        assert {signal.getsignal(number) for number in before} == {handler}
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000 and os.getcwd() == folder
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in before.items():
            signal.signal(number, old)


def test_in_another_thread_and_without_a_limit():
    got = []
    thread = threading.Thread(target=lambda: got.extend(judge(task(odd), ["x"], [1.0])))
    thread.start()
    thread.join()
    assert got == judge(task(odd), ["x"], [1.0], timeout=0) == [(1.0, "a verdict")]


def child_that_ignores(response, truth):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    time.sleep(0.1)
    child.terminate()
    child.join(5)
    ended = child.exitcode == -signal.SIGTERM
    child.kill()
    return float(ended), "ended" if ended else "goes on"


def test_a_process_that_score_starts_ends_when_it_is_terminated(monkeypatch):
    hooks = []
    monkeypatch.setattr(os, "register_at_fork", lambda after_in_child: hooks.append(after_in_child))
    reset_signals_in_children.cache_clear()
    for _ in range(2):
        reset_signals_in_children()
    assert hooks == [module._reset_signals]  # once, and for good
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer that ends after its step
    try:
        pid = os.fork()
        if not pid:
            hooks[0]()
            os._exit(0 if judge(task(child_that_ignores), ["x"], [1]) == [(1.0, "ended")] else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert judge(task(child_that_ignores), ["x"], [1], workers=1) == [(1.0, "ended")]
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
        reset_signals_in_children.cache_clear()


def test_a_late_process_dies_with_the_processes_it_started(tmp_path):
    def score(response, truth):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(60)

    assert judge(task(score), ["x"], [1], timeout=0.5, workers=1) == [(0.0, "timeout")]
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    for _ in range(100):  # it was killed, but need not be gone at once
        if not stat.exists() or re.search(r"\) [ZX] ", stat.read_text()):
            return
        time.sleep(0.1)
    raise AssertionError("a process that score() started goes on")


def test_a_task_is_checked_once(capsys):
    calls = []

    def right(response, truth):
        calls.append(response)
        return 1.0, "right"

    check_task(task(right), [row()] * 50)
    assert len(calls) == 3 and capsys.readouterr().err == ""
    for reward in (100.0, -1, 0.1):
        check_task(task(lambda response, truth, reward=reward: (reward, "x")), [row()] * 2)
        assert (
            f"the rewards [{float(reward)}, {float(reward)}]; only 1.0 counts as right"
            in capsys.readouterr().err
        )
    check_task(task(lambda response, truth: (0.0, "no answer")), [row(answer="")])  # no reference answer
    check_task(task(right), [])
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"task data.mine, row 0 .*must return \(reward, verdict\)"):
        check_task(task(lambda response, truth: 1.0), [row()])
