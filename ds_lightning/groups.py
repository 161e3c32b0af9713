"""The process groups of a schedule: all made once, before training, in the same order on every rank."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from ds_lightning.schedule import Group, Schedule, check_schedule, schedule_parts, schedule_period

T = TypeVar("T")

_EXCHANGES = itertools.count()  # of this process, and the same on all ranks: the store may outlive process groups
GRACE = 2.0  # seconds: torch's own error, which says more, is to come first


class ScheduledGroups:
    """The process group in which this rank averages at every round of a schedule.

    A *round* counts synchronizations; it is the schedule's step. A rank belongs to at most log_g(N) groups of a grid
    (rounded up) and ``ShuffleSchedule.POOL_SIZE`` of a shuffle. Groups are made by the constructor and by
    :meth:`change` alone, so training never waits for a rendezvous and the number of communicators (GPU memory) is
    bounded.

    Args:
        schedule: Who averages with whom; must be the same on all ranks.
        timeout: How long a collective of these groups may take before it is an error. ``new_group`` does not inherit
            the default group's; ``None`` is torch's default for the backend.
        hosts: Host of each rank, for messages; gathered if not given.

    Raises:
        ValueError: On every rank alike, if the schedule is malformed on any rank, or ranks have different ones.
        RuntimeError: If there is no default process group yet.
    """

    def __init__(self, schedule: Schedule, timeout: timedelta | None = None, hosts: list[str] | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "ScheduledGroups needs a process group. HINT: call torch.distributed.init_process_group."
            )
        self.rank = dist.get_rank()
        self.timeout = timeout
        error = None
        table: list[list[Group]] = []
        try:
            if schedule.world_size != dist.get_world_size():
                raise ValueError(
                    f"schedule={schedule!r} is for {schedule.world_size} ranks but the world size is"
                    f" {dist.get_world_size()}. HINT: make it for {dist.get_world_size()} ranks."
                )
            check_schedule(schedule)
            table = _table(schedule)
            parts = schedule_parts(schedule)
        except Exception as e:  # whatever a user's schedule raises on one rank must end all ranks alike
            error, parts = str(e), 1
            if "HINT: " not in error:
                error = (
                    f"schedule={schedule!r} could not be asked: {type(e).__name__}: {e}. HINT: `partition(step)` and"
                    " `group(rank, step)` must answer at every step."
                )
        require_agreement("the schedule's partitions", table if parts == 1 else (parts, table), error)
        self.hosts = gather_hosts() if hosts is None else hosts
        self.look: tuple[int, int] | None = None  # a round, and the partition that it averages all parts in
        self._made: dict[Group, dist.ProcessGroup | None] = {}  # None: this rank is no member
        self.change(schedule)

    def change(self, schedule: Schedule) -> None:
        """Make the process groups of a schedule, and destroy those that it does not need.

        Collective over all ranks, between two rounds, with nothing under way in any group.

        Args:
            schedule: A valid one, the same on all ranks.
        """
        self.look = None
        self.schedule, self.period, self.parts = schedule, schedule_period(schedule), schedule_parts(schedule)
        # Every rank makes every group, in the order of steps: `new_group` is collective over all ranks. (Its local mode
        # names groups by a count that differs between ranks as soon as one of them belongs to fewer groups, and hangs.)
        before, self._made = self._made, {}
        for partition in _table(schedule):
            for members in partition:
                if len(members) > 1 and members not in self._made:
                    self._made[members] = before.pop(members) if members in before else self._make(members)
        if before:
            within(self.timeout, dist.barrier)  # what others are to receive in them must have arrived
        for group in before.values():
            if group is not None:
                dist.destroy_process_group(group)
        own = [tuple(sorted(schedule.group(self.rank, t))) for t in range(self.period)]
        self._groups = [(members, self._made.get(members)) for members in own]

    def _make(self, members: Group) -> dist.ProcessGroup | None:
        with connecting_later(False):
            group = within(self.timeout, partial(dist.new_group, list(members), timeout=self.timeout))
        return group if isinstance(group, dist.ProcessGroup) else None

    def at(self, round_: int, part: int = 0) -> tuple[Group, dist.ProcessGroup | None]:
        """The ranks that this rank averages with at ``round_``, and their process group (``None`` when it is alone).

        Args:
            round_: Synchronizations before this one.
            part: Of the parameters, where the schedule has several.
        """
        if self.look is not None and self.look[0] == round_:
            return self._groups[self.look[1]]
        return self._groups[(round_ + part) % self.period]

    @property
    def members(self) -> dict[Group, dist.ProcessGroup]:
        """The process groups that this rank belongs to, by their ranks."""
        return {members: group for members, group in self._groups if group is not None}

    def __len__(self) -> int:
        """Number of process groups that this rank belongs to."""
        return len(self.members)


def _table(schedule: Schedule) -> list[list[Group]]:
    """The groups of each step of a period."""
    return [[tuple(sorted(group)) for group in schedule.partition(t)] for t in range(schedule_period(schedule))]


def gather_hosts() -> list[str]:
    """The host of each rank."""
    hosts: list[str] = json.loads(exchange(socket.gethostname(), json.dumps))
    return hosts


def name_ranks(ranks: Iterable[int], hosts: list[str]) -> str:
    """Ranks and their hosts, for messages."""
    named = [f"{rank} ({hosts[rank]})" if hosts else f"{rank}" for rank in ranks]
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"rank{'s' * (len(named) != 1)} {', '.join(named[:8])}{more}"


def name_timeout(timeout: timedelta | None) -> str:
    """A timeout, for messages."""
    return "the backend's default timeout" if timeout is None else f"{timeout}"


def within(timeout: timedelta | None, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, which must be what makes process groups or asks the key-value store.

    torch waits for the store's answers without a limit, so that a rank whose link is cut would never end.

    Raises:
        RuntimeError: If it takes longer than the timeout and :data:`GRACE`.
    """
    if timeout is None:
        return call()
    future: Future[T] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # each thread has its own

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="dssync: store", daemon=True).start()
    try:
        return future.result(timeout.total_seconds() + GRACE)
    except FutureTimeoutError:
        if future.done():  # its own error: from Python 3.11 on it is of this class as well
            raise
        raise RuntimeError("the key-value store, or a rank, does not answer") from None


@contextmanager
def connecting_later(later: bool = True) -> Iterator[None]:
    """A process group of gloo made inside connects no ranks yet, in the place of each pair: call :func:`connect`.

    By torch's own variable, which torch before 2.8 does not know; a user's value of it decides. With ``later`` false
    each pair is connected at once, whatever the variable says.
    """
    variable = "TORCH_GLOO_LAZY_INIT"
    before = os.environ.get(variable)
    os.environ[variable] = (before or "1") if later else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def connect(timeout: timedelta | None) -> None:
    """Make the connections of gloo that collectives of all ranks use: about N log2 N of the N^2/2 pairs. Collective.

    At once, because gloo may wait without a limit for a rank that ends before both were connected (gloo issue 520).

    Raises:
        RuntimeError: If that takes longer than the timeout and :data:`GRACE`.
    """

    def run() -> None:
        dist.barrier()  # ranks 1, 2, 4, ... apart, among which are all rings and trees
        gathered = [torch.empty(1) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
        dist.gather(torch.zeros(1), gathered)  # everybody with rank 0, as reduce and scatter

    if dist.get_backend() == "gloo":
        within(timeout, run)


def own_store(name: str, timeout: timedelta | None) -> Store:
    """The store that the process groups were made with, by keys and over a connection that nobody else uses.

    A call that waits for another rank's word would hold up all that use the same connection. Only a ``TCPStore`` has
    one: a copy of a ``FileStore`` that is discarded in a forked process too (of a loader) removes the file.
    """
    store = _get_default_store()
    connected = isinstance(getattr(store, "_underlying_non_prefix_store", store), dist.TCPStore)  # type: ignore[attr-defined]
    return PrefixStore(f"dssync: {name}", within(timeout, store.clone) if connected else store)


class Attendance:
    """Says whom a rank waited for when all were to meet: each tells the key-value store before it waits.

    Args:
        store: With keys that nobody else uses; another for each attendance of a process.
        timeout: Of the collectives, for messages.
    """

    def __init__(self, store: Store, timeout: timedelta | None) -> None:
        self._store = store
        self._rank, self._timeout = dist.get_rank(), timeout
        self._meetings = 0
        self._inside = False
        self.hosts: list[str] = []
        with self.at("to begin"):
            self.hosts = gather_hosts()

    @contextmanager
    def at(self, what: str, often: bool = False) -> Iterator[None]:
        """Around collectives of all ranks, which must be the same on all of them.

        Args:
            what: For what they meet.
            often: They do so in every step, perhaps: nothing is told, and all others are named in an error.

        Raises:
            RuntimeError: If the collectives fail; names the ranks that did not come.
        """
        if self._inside:
            yield
            return
        self._inside = True
        try:
            if not often:
                self._meetings += 1
                self._store.set(str(self._rank), f"{self._meetings}")
            yield
        except torch.OutOfMemoryError:
            raise  # a RuntimeError as well
        except RuntimeError as error:
            raise RuntimeError(
                f"Rank {self._rank} waited in vain for {self._absent(often)} {what}, at most"
                f" {name_timeout(self._timeout)}: {error}. HINT: one of them ended, stopped, or is elsewhere in its"
                " program; its own log says more."
            ) from error
        finally:
            self._inside = False

    def _absent(self, unknown: bool) -> str:
        others = [rank for rank in range(dist.get_world_size()) if rank != self._rank]
        if unknown:
            return name_ranks(others, self.hosts)
        came: list[int] = []

        def ask() -> None:
            for rank in others:
                if self._store.check([str(rank)]) and int(self._store.get(str(rank))) >= self._meetings:
                    came.append(rank)
            answered.set()

        # The store's server may hang, be cut off, or have ended with rank 0.
        answered = threading.Event()
        thread = threading.Thread(target=_quietly, args=(ask,), daemon=True)
        thread.start()
        thread.join(1)  # all waits after the timeout together are to stay below 5 s
        absent = [rank for rank in others if rank not in came]
        return name_ranks(absent if answered.is_set() and absent else others, self.hosts)


def _quietly(function: Callable[[], None]) -> None:
    with suppress(Exception):
        function()


def require_agreement(what: str, value: object, error: str | None = None) -> None:
    """Raise the same ``ValueError`` on every rank unless all ranks have the same ``value`` and no ``error``.

    Args:
        what: What is compared, for the message.
        value: Compared by its ``repr``; only a digest travels unless ranks differ.
        error: What this rank alone may have found wrong.
    """
    mine = [hashlib.sha256(repr(value).encode()).hexdigest(), error]
    verdict = json.loads(exchange(json.dumps(mine), lambda words: json.dumps(_judge([*map(json.loads, words)]))))
    if isinstance(verdict, str):
        raise ValueError(verdict)
    if verdict:  # ranks whose value differs from rank 0's
        shown = repr(value) if dist.get_rank() in (0, verdict[0]) else ""
        difference = exchange(shown, lambda words: _difference(words[verdict[0]], words[0]))
        raise ValueError(
            f"Ranks do not agree on {what}: rank {verdict[0]} differs from rank 0 ({difference});"
            f" ranks that differ from rank 0: {verdict}. HINT: build it from the same arguments and seed on every rank."
        )


def _judge(everyones: list[tuple[str, str | None]]) -> str | list[int]:
    """An error that some rank has, or the ranks whose digest is not that of rank 0."""
    if errors := {rank: error for rank, (_, error) in enumerate(everyones) if error is not None}:
        where = "on every rank" if len(errors) == len(everyones) else f"on ranks {sorted(errors)}"
        return f"{errors[min(errors)]} (found {where})"
    return [rank for rank, (digest, _) in enumerate(everyones) if digest != everyones[0][0]]


def exchange(word: str, conclude: Callable[[list[str]], str]) -> str:
    """What rank 0 concludes from the words of all ranks. Collective.

    Each rank sends two messages and receives one, through the key-value store; a collective would take N of each.

    Raises:
        RuntimeError: If a rank, or the store, does not answer within the timeout of the store.
    """
    default = _get_default_store()
    store = PrefixStore(f"dssync: exchange {next(_EXCHANGES)}", default)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def run() -> str:
        store.set(str(rank), word)
        if rank == 0:
            store.set("conclusion", conclude([store.get(str(r)).decode() for r in range(ranks)]))
        conclusion = store.get("conclusion").decode()
        if store.add("read", 1) == ranks:
            store.set("all have read", "")
        if rank == 0:  # whose process keeps the store, and may end with an error now
            store.wait(["all have read"])
        return str(conclusion)

    return within(default.timeout, run)  # type: ignore[attr-defined]


def _difference(one: str, other: str) -> str:
    """The first place where two texts part, with a little around it."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, at - 40)
    return f"...{one[start : at + 60]!r}... against ...{other[start : at + 60]!r}..."
