"""Workers, shared ranges and the byte budget."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sd_mecha
from sd_mecha.execution.budget import Budget
from sd_mecha.execution.pool import Pool, Stopped
from sd_mecha.extensions.merge_methods import Parameter, Return, merge_method
from tests.execution.support import merged, tensor, threads_alive, tiles


class Failure(Exception):
    pass


def pool(workers: int) -> Pool[int]:
    numbers = iter(range(1000))
    return Pool(workers, lambda: next(numbers))


# --- the pool --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_every_job_and_every_shared_task_is_done_once(workers: int) -> None:
    done: list[tuple[int, int]] = []
    lanes: set[int] = set()
    p = pool(workers)

    def work(lane: int, job: int) -> None:
        def task(i: int) -> Any:
            return lambda lane: (lanes.add(lane), done.append((job, i)))

        p.share(lane, (task(i) for i in range(job)))

    p.run(iter(range(20)), work)
    assert Counter(done) == {(job, i): 1 for job in range(20) for i in range(job)}
    assert len(lanes) <= max(workers, 1)
    assert threads_alive() == set()


def test_idle_workers_help_with_the_last_tensor() -> None:
    p = pool(4)
    meeting = threading.Barrier(4)
    p.run(iter([0]), lambda lane, job: p.share(lane, [lambda lane: meeting.wait(10)] * 4))
    assert not meeting.broken


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_the_first_exception_stops_everybody(workers: int) -> None:
    started: list[int] = []
    p = pool(workers)

    def work(lane: int, job: int) -> None:
        started.append(job)
        if job == 5:
            raise Failure("five")
        time.sleep(0.001)
        p.check()

    with pytest.raises(Failure, match="five"):
        p.run(iter(range(10_000)), work)
    assert len(started) < 1000
    assert threads_alive() == set()


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_a_failing_task_is_told_to_the_one_who_shared_it(workers: int) -> None:
    """Whoever ran it: the owner of the tensor may know what to do about it, and go on."""
    p = pool(workers)
    caught: list[BaseException] = []
    running = Counter[str]()
    after: list[int] = []

    def task(i: int) -> Any:
        def run(lane: int) -> None:
            running["now"] += 1
            time.sleep(0.002)
            running["now"] -= 1
            if i == 3:
                raise Failure("three")

        return run

    def work(lane: int, job: int) -> None:
        try:
            p.share(lane, map(task, range(50)))
        except Failure as error:
            caught.append(error)
        after.append(running["now"] if workers < 2 else 0)
        p.share(lane, [lambda lane: after.append(job)])

    p.run(iter([7]), work)
    assert len(caught) == 1
    assert 7 in after
    assert threads_alive() == set()


def test_when_a_task_fails_none_of_its_batch_is_running_any_more() -> None:
    p = pool(4)
    all_in = threading.Barrier(4)
    running: set[int] = set()
    left: list[set[int]] = []

    def task(i: int) -> Any:
        def run(lane: int) -> None:
            running.add(i)
            all_in.wait(10)
            if i == 0:
                running.discard(i)
                raise Failure
            time.sleep(0.05)
            running.discard(i)

        return run

    def work(lane: int, job: int) -> None:
        try:
            p.share(lane, map(task, range(4)))
        except Failure:
            left.append(set(running))

    p.run(iter([0]), work)
    assert left == [set()]


def test_stopping_from_outside() -> None:
    p = pool(2)
    started = threading.Event()

    def work(lane: int, job: int) -> None:
        started.set()
        while True:
            p.check()
            time.sleep(0.001)

    outcome: list[BaseException] = []

    def run() -> None:
        try:
            p.run(iter([0, 1]), work)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    p.stop(Stopped())
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(outcome[0], Stopped)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_threads_are_as_before(workers: int) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    pool(workers).run(iter([0]), lambda lane, job: seen.append(torch.get_num_threads()))
    assert seen == [1]
    assert torch.get_num_threads() == before


# --- the budget ------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), limit=st.integers(0, 40))
def test_claims_stay_within_the_budget_or_run_alone(sizes: list[int], limit: int) -> None:
    budget = Budget(limit)
    lock = threading.Lock()
    alive: list[int] = []
    wrong: list[list[int]] = []

    def claim(size: int) -> None:
        with budget.claim(size):
            with lock:
                alive.append(size)
                if sum(alive) > limit and len([s for s in alive if s]) > 1:
                    wrong.append(list(alive))
            time.sleep(0.0002)
            with lock:
                alive.remove(size)

    threads = [threading.Thread(target=claim, args=(s,)) for s in sizes]
    for t in threads:
        t.start()
    for t in threads:
        t.join(10)
    assert not any(t.is_alive() for t in threads)
    assert wrong == []
    assert budget.used == 0


def test_nobody_waits_for_a_budget_once_it_is_stopped() -> None:
    budget = Budget(10)
    with budget.claim(10):
        thread = threading.Thread(target=lambda: budget.claim(5).__enter__())
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        budget.stop()
        thread.join(10)
        assert not thread.is_alive()


class Live:
    """How many calls of a whole-tensor method are running at once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.Lock()

    def method(self, seconds: float = 0.02) -> Any:
        @merge_method(register=False)
        def observed(a: Parameter(Tensor)) -> Return(Tensor):
            if a.is_meta:
                return a * 1
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(seconds)
            with self.lock:
                self.now -= 1
            return a * 1

        return observed


def test_entire_tensors_are_admitted_within_the_budget() -> None:
    live = Live()
    values = {f"k{i}": tensor((10_000,), seed=i) for i in range(12)}
    recipe = live.method()(sd_mecha.model(values))
    with sd_mecha.plan(recipe) as plan:
        each = max(p.template.whole_bytes for p in plan.programs)
    assert each >= 2 * 40_000  # input and result
    merged(recipe, threads=6, total_buffer_size=2 * each + 1)
    assert live.most == 2
    live.most = 0
    merged(recipe, threads=6, total_buffer_size=each - 1)
    assert live.most == 1
    live.most = 0
    merged(recipe, threads=4, total_buffer_size=1 << 30)
    assert live.most > 2


def test_a_method_that_fails_under_a_tight_budget_stops_all() -> None:
    @merge_method(register=False)
    def fails_late(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        if a.is_meta:
            return a * 1
        if kwargs["key"] == "k5":
            raise Failure
        return a * 1

    m = sd_mecha.model({f"k{i}": tensor((10_000,), seed=i) for i in range(40)})
    with pytest.raises(Failure) as caught:
        merged(fails_late(m), threads=8, total_buffer_size=0)
    assert "fails_late failed at key 'k5'" in str(caught.value.__notes__)
    assert threads_alive() == set()


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_each_range_of_a_shared_tensor_is_computed_once(threads: int) -> None:
    ranges: list[tuple[int, int]] = []

    @merge_method(register=False, tiling="elementwise")
    def observed(a: Parameter(Tensor), **kwargs: Any) -> Return(Tensor):
        tile = kwargs["tile"]
        if tile.numel > 1:
            ranges.append((tile.start, tile.stop))
        return a * 1

    numel = 50 * 4096 + 77
    with tiles(1 << 12, 3 << 12):
        got = merged(observed(sd_mecha.model({"w": tensor((numel,))})), threads=threads)
    assert torch.equal(got["w"], tensor((numel,)))
    assert sorted(ranges) == [(a, min(a + 4096, numel)) for a in range(0, numel, 4096)]
