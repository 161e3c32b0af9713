"""Where averages go on while the caller computes: a thread for gloo, a CUDA stream for NCCL; and how long they take."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from typing_extensions import override


class Result(Protocol):
    """What a task will have done."""

    def result(self) -> Any:
        """Wait until the task has run; raises what it raised."""

    def seconds_since(self, other: Any) -> float | None:
        """From the end of another task of the lane to the end of this one; None if that is not known yet."""


class _Done(Future[None]):
    """That of a thread."""

    ended: float | None = None

    def seconds_since(self, other: _Done) -> float | None:
        return None if self.ended is None or other.ended is None else self.ended - other.ended


class Lane:
    """Runs tasks one after the other beside the caller, in a thread: gloo's waits block whoever waits.

    The thread ends with the lane. It is a daemon: a process that fails must end, whatever this thread waits for.
    """

    groups_messages = False  # whether what a rank sends and receives must be one operation

    def __init__(self) -> None:
        self.clock: Clock | None = None
        self._tasks: queue.SimpleQueue[tuple[Callable[[], None], _Done, Clock | None] | None] | None = None

    def run(self, task: Callable[[], None]) -> Result:
        """Queue a task."""
        if self._tasks is None:
            self._tasks = queue.SimpleQueue()
            threading.Thread(target=_work_off, args=(self._tasks,), name="dssync", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)
        done = _Done()
        self._tasks.put((task, done, self.clock))
        return done

    def new_clock(self) -> Clock:
        """A clock that suits this lane, started."""
        return Clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the wait inside, if the time is taken."""
        clock = self.clock
        if clock is not None:
            clock.wait_begins()
        yield
        if clock is not None:
            clock.wait_ends()


def _work_off(tasks: queue.SimpleQueue[Any]) -> None:
    while (item := tasks.get()) is not None:
        task, done, clock = item
        try:
            task()
            done.ended = time.perf_counter()
            if clock is not None:
                clock.task_ended()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)
        del item, task, done, clock  # nothing may keep a payload alive until the next task comes


class StreamLane(Lane):
    """Runs tasks on a CUDA stream of its own: NCCL's waits hold up the stream, never the host."""

    groups_messages = True

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._stream = torch.cuda.Stream(device)

    @override
    def run(self, task: Callable[[], None]) -> Result:
        self._stream.wait_stream(torch.cuda.current_stream())  # what a task sends has been packed there
        with torch.cuda.stream(self._stream):
            task()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            if self.clock is not None:
                self.clock.task_ended()
        return _StreamResult(event)

    @override
    def new_clock(self) -> Clock:
        return StreamClock()


class _StreamResult:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def result(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def seconds_since(self, other: _StreamResult) -> float | None:
        return other._event.elapsed_time(self._event) / 1000 if self._event.query() else None


def make_lanes(device: torch.device, group: dist.ProcessGroup, number: int) -> list[Lane]:
    """Lanes that suit the backend of a group.

    NCCL's operations share a stream: in an order that is not the same on all ranks they would wait for each other.
    """
    if device.type == "cuda" and "nccl" in dist.get_backend(group):
        return [StreamLane(device)] * number
    return [Lane() for _ in range(number)]


class Clock:
    """Times one synchronization on the host: how long it ran in all, and how long somebody waited for it."""

    exposed = False  # set where nothing could hide it: then all of it counts as waited for

    def __init__(self) -> None:
        self._start = self._end = self._begun = time.perf_counter()
        self._waited = 0.0

    def task_ended(self) -> None:
        """A part of the average has ended; called in the lane."""
        self._end = time.perf_counter()

    def wait_begins(self) -> None:
        """The average is needed from here on."""
        self._begun = time.perf_counter()

    def wait_ends(self) -> None:
        """Whatever needed it goes on."""
        self._waited += time.perf_counter() - self._begun

    @property
    def ended(self) -> bool:
        """Whether :meth:`seconds` would answer at once."""
        return True

    def seconds(self) -> tuple[float, float]:
        """Seconds waited, and seconds run; on CUDA this waits for them to end."""
        ran = max(self._end - self._start, self._waited)
        return ran if self.exposed else self._waited, ran


class StreamClock(Clock):
    """Times a synchronization by CUDA events, without blocking the host before :meth:`seconds`."""

    def __init__(self) -> None:
        self._started, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._waits: list[torch.cuda.Event] = []
        self._started.record()
        self._ended.record()

    @override
    def task_ended(self) -> None:
        self._ended.record()

    def _mark(self) -> None:
        self._waits.append(torch.cuda.Event(enable_timing=True))
        self._waits[-1].record()

    @override
    def wait_begins(self) -> None:
        self._mark()

    @override
    def wait_ends(self) -> None:
        self._mark()

    @property
    @override
    def ended(self) -> bool:
        return all(event.query() for event in (*self._waits, self._ended))

    @override
    def seconds(self) -> tuple[float, float]:
        for event in (*self._waits, self._ended):
            event.synchronize()
        pairs = zip(self._waits[::2], self._waits[1::2], strict=True)
        waited = sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        ran = max(self._started.elapsed_time(self._ended) / 1000, waited)
        return ran if self.exposed else waited, ran
