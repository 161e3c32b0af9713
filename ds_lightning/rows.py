"""Large embedding tables: a synchronization sends the rows that somebody touched, not the table.

An `nn.Embedding` or `nn.EmbeddingBag` with ``sparse=True`` has sparse gradients, and optimizers that take them (SGD,
Adagrad, SparseAdam) move only the rows that the batch looked up. A row that everybody has alike needs no averaging. So
each rank keeps, for every row, for how many more rounds the row must be sent::

    touched by this rank's update   ->  k rounds, in which the schedule reaches exact consensus (a grid of k axes)
    sent in this round              ->  the most that any member had, minus 1
    0 with every member             ->  all members have the same values: not sent, and nothing is lost

By induction a group whose members all have 0 for a row holds equal copies of it: whatever moved the row has since met k
partitions, and is spread evenly over all ranks. The result is that of averaging the whole table, up to fp32 rounding
(with a lossy wire, members keep their rounding errors of a row until it is sent again). The mean over ranks never
changes. With a schedule that has no exact consensus a touched row is sent until the next consensus point.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from ds_lightning.lanes import Lane
from ds_lightning.payload import Payload
from ds_lightning.schedule import GridSchedule, Group, Schedule

_INDEX = 4  # bytes: a row's number travels as int32


def is_table(module: nn.Module) -> bool:
    """Whether a module's ``weight`` is averaged by rows."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse


class TouchedRows:
    """Averages the touched rows of ``tables`` in place, any number of times.

    In a round, members first swap which rows they have to send, then the values of all rows that any of them has. A
    table of which nearly all rows are due costs one byte per row more than averaging it whole.

    Args:
        tables: Parameters of shape (rows, width), all of one dtype.
        wire: dtype in which the values travel.
        schedule: Who averages with whom.
        channel: As of :class:`~ds_lightning.payload.Payload`.
    """

    def __init__(self, tables: list[Tensor], wire: torch.dtype, schedule: Schedule, channel: int) -> None:
        self.tables = tables
        self._wire, self._channel = wire, channel
        # For every row of each table, the rounds for which it must be sent yet.
        self.due: list[Tensor] = []
        # Rounds to exact consensus; 0: it is never exact.
        self._rounds = len(schedule.dims) if isinstance(schedule, GridSchedule) else 0
        self._running: _RunningRows | None = None
        self.bytes_sent = 0  # by the latest average
        self.agreed()

    def agreed(self) -> None:
        """All ranks have the same tables. What may be under way in a lane keeps the old counts."""
        self.due = [torch.zeros(len(table), dtype=torch.uint8, device=table.device) for table in self.tables]

    def touch_all(self) -> None:
        """An average under way was forgotten: any row may differ."""
        self.due = [torch.full_like(due, max(self._rounds, 1)) for due in self.due]

    def touch(self, optimizer: Optimizer) -> None:
        """Note the rows that the coming (or last) update moves, by the gradients that it reads."""
        for table, due in zip(self.tables, self.due, strict=True):
            # A momentum moves rows on after their gradients.
            for moved in (table.grad, optimizer.state.get(table, {}).get("momentum_buffer")):
                if moved is not None and moved.layout == torch.strided:
                    due.fill_(max(self._rounds, 1))
                elif moved is not None:
                    due.index_fill_(0, moved._indices()[0], max(self._rounds, 1))

    def start(self, members: Group, group: dist.ProcessGroup, lane: Lane) -> None:
        """Start averaging over ``members``."""
        self.bytes_sent = 0  # not known before the members have said what they have
        self._running = _RunningRows(self.tables, self.due, self._rounds > 0, self._wire, self._channel)
        self._running.start(members, group, lane)

    def finish(self) -> None:
        """Wait, and add the differences to the rows."""
        assert self._running is not None
        self._running.finish()
        self.bytes_sent, self._running = self._running.bytes_sent, None


class _RunningRows:
    """One average of touched rows, under way."""

    def __init__(
        self, tables: list[Tensor], due: list[Tensor], counts_down: bool, wire: torch.dtype, channel: int
    ) -> None:
        self._tables, self._due, self._counts_down, self._wire = tables, due, counts_down, wire
        self._channel = channel
        self._union: list[Tensor] = []
        self._values: Tensor | None = None
        self._payload: Payload | None = None
        self.bytes_sent = 0

    def start(self, members: Group, group: dist.ProcessGroup, lane: Lane) -> None:
        self._members, self._group, self._lane = members, group, lane
        self._others = [rank for rank in members if rank != dist.get_rank()]
        self._home = self._due[0].device if "nccl" in dist.get_backend(group) else torch.device("cpu")
        self._swapped = lane.run(self._swap)

    @torch.no_grad()
    def finish(self) -> None:
        with record_function("dssync: wait"), self._lane.waiting():
            self._swapped.result()
        if self._payload is None or self._values is None:
            return
        self._payload.finish()
        with record_function("dssync: apply"):
            sizes = [len(union) * table[0].numel() for union, table in zip(self._union, self._tables, strict=True)]
            for table, union, part in zip(self._tables, self._union, self._values.split(sizes), strict=True):
                table.index_add_(0, union, part.view(-1, *table.shape[1:]).to(table.dtype))

    @torch.no_grad()
    def _swap(self) -> None:
        """In the lane: who has which rows due, and then the values of all of them."""
        mine = [due.nonzero().view(-1) for due in self._due]
        counts = torch.tensor([len(rows) for rows in mine], device=self._home)
        everyones = self._exchange(counts, [torch.empty_like(counts) for _ in self._others], -2)
        sizes = [[*map(_message_size, map(len, self._due), row.tolist())] for row in everyones]
        messages = [_message(due, rows).to(self._home) for due, rows in zip(self._due, mine, strict=True)]
        rooms = [torch.empty(sum(size), dtype=torch.uint8, device=self._home) for size in sizes]
        for room, size in zip(self._exchange(torch.cat(messages), rooms, -1), sizes, strict=True):
            for due, message in zip(self._due, room.split(size), strict=True):
                _merge(due, message.to(due.device))
        self._union = [due.nonzero().view(-1) for due in self._due]
        if self._counts_down:
            for due, union in zip(self._due, self._union, strict=True):
                due[union] -= 1
        gathered = [table[union].flatten() for table, union in zip(self._tables, self._union, strict=True)]
        values = torch.cat(gathered)
        if values.numel():
            self._values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
            self._payload = Payload([self._values], self._wire, self._channel)
            self._payload.start(self._members, self._group, self._lane)
            self.bytes_sent += self._payload.bytes_sent
            self._values.zero_()  # packed: what comes back is the difference alone

    def _exchange(self, mine: Tensor, theirs: list[Tensor], tag: int) -> list[Tensor]:
        """Send ``mine`` to every other member and receive theirs; empty messages are not sent."""
        tag += self._channel << 16
        received = zip(theirs, self._others, strict=True)
        operations = [dist.P2POp(dist.irecv, room, rank, self._group, tag) for room, rank in received if room.numel()]
        if mine.numel():
            operations += [dist.P2POp(dist.isend, mine, rank, self._group, tag) for rank in self._others]
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        self.bytes_sent += mine.nbytes * len(self._others)
        return theirs


def _message_size(rows: int, count: int) -> int:
    """Bytes that tell which rows are due, and for how long: by number while these are few, else for every row."""
    return min(count * (_INDEX + 1), rows)


def _message(due: Tensor, rows: Tensor) -> Tensor:
    if len(rows) * (_INDEX + 1) >= len(due):
        return due
    return torch.cat([rows.int().view(torch.uint8), due[rows]])


def _merge(due: Tensor, message: Tensor) -> None:
    """Let every row be due for as long as with any member."""
    if len(message) == len(due):
        torch.maximum(due, message, out=due)
        return
    count = len(message) // (_INDEX + 1)
    rows = message[: count * _INDEX].clone().view(torch.int32).long()
    due[rows] = torch.maximum(due[rows], message[count * _INDEX :])
