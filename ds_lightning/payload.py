"""What is sent, in buffers made once: packed bucket by bucket, averaged in the group, applied as a difference.

Every member ends with ``x + average - Q(x)``, where ``x`` is what it packed and ``Q`` the rounding of the wire. Adding
this *difference*, instead of overwriting, keeps the sum over the members for any ``Q`` (and what anyone changed in the
meantime)::

    sum_i (x_i + mean_j Q(x_j) - Q(x_i)) = sum_i x_i

The average is never added up in the wire's dtype: an all-reduce in bf16 would round the sum, which hits all members
alike, and the mean would walk away. Pairs swap rounded copies. In larger groups every member owns a shard: it is sent
the others' rounded copies of it, adds them up in fp32, and sends the rounded mean to all. Rounding the mean moves the g
copies alike, so the owner, which never rounds its own shard, takes g times that residual back. The bytes are those of
a ring all-reduce in the wire's dtype: 2 (g - 1) / g of the values.

A payload that follows changes also measures them, by tensor, where the values are in the cache anyway: what an average
adds, and what the updates after it add. It keeps what those are added to, the *base* ``x + average - Q(x)``; where
buffers hold ``x`` in full precision that is in its place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ds_lightning.lanes import Lane, Result
from ds_lightning.schedule import Group
from ds_lightning.wire import Code, codec_for

# Values per bucket: about an eighth of all, so that one is packed while the one before it travels. Fewer would be
# mostly latency, and more would only delay the first byte.
_BUCKETS, _SMALLEST_BUCKET, _LARGEST_BUCKET = 8, 1 << 16, 1 << 22
# Values rounded at a time: what stays in a processor's cache; a GPU prefers few large kernels. Where none is rounded
# there are fewer passes, and calls cost more than a larger cache.
_TILE_ON_CPU, _EXACT_TILE_ON_CPU, _TILE_ON_GPU = 1 << 15, 1 << 18, 1 << 22
# On a CPU, of a piece of a tensor in a tile, so many runs of so many values tell how far all of it moved.
_RUNS, _RUN = 32, 512
# Buckets of which the second stage may be under way: each needs room for its rounded mean.
_AHEAD = 2


class Stretches(NamedTuple):
    """How much longer changes get, by number: a value ``u`` of them by ``factor * clamp(u, -limit, limit)``.

    Attributes:
        factors: See above; where this is 0, changes stay as they are.
        limits: See above.
        kept: The share of the base that is still there; what else was taken away stays as it is.
    """

    factors: Sequence[float]
    limits: Sequence[float]
    kept: Sequence[float]


class Followed:
    """Whose changes a payload sums up: of all values, on a CPU of some that are spread evenly, of both sums the same.

    Args:
        numbers: Of each tensor of the payload, the number under which its changes count.
        count: Of the numbers, from 0.
        device: Of the tensors.

    Attributes:
        squares: By number, the sum of squares of what the latest average added; shape (count + 1,), where the last one
            is nobody's.
        updates: The same of the latest updates.
    """

    def __init__(self, numbers: Sequence[int], count: int, device: torch.device) -> None:
        self.numbers = [*numbers, count]  # padding comes after the tensors
        self.squares, self.updates = torch.zeros(2, count + 1, device=device).unbind()
        self.of_averages = self.squares.unbind()


class Payload:
    """Averages ``tensors`` in place, any number of times, in groups that may differ each time.

    :meth:`start` packs and returns while the average is under way; :meth:`finish` adds ``average - packed copy``. In
    between, the tensors may be read and written, and :meth:`stretch` may lengthen what was added to them.

    The buffers take, as multiples of the tensors' bytes in fp32: 2 at an fp32 wire, 1 at bf16 and fp16, 0.53 (pairs) to
    0.65 (groups of 4) at int8; besides, two tiles of 1 MiB (at other wires 128 KiB, on a GPU 16 MiB). Following
    changes takes 1 more, at an fp32 wire 1 / g in groups of g > 2 and nothing in pairs.

    Args:
        tensors: Strided real floating tensors of one dtype that do not overlap; of the same shapes and strides on all
            ranks.
        wire: dtype to send in: that of the tensors, or one of ``WIRE_DTYPES``.
        channel: Tells apart the payloads that may be under way in a group at a time; 1 or more, the same on all ranks.
        follow: Under which numbers their changes are summed up; None: they are not followed.
    """

    def __init__(
        self, tensors: Sequence[Tensor], wire: torch.dtype, channel: int = 1, follow: Followed | None = None
    ) -> None:
        self._channel, self._follow = channel, follow
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        self._room = _Room(wire, dtype, tensors[0].device)
        self._current: _Layout | None = None  # whose buffers hold the base
        self._stretched = False  # what was added to it: nobody asks for the base any more
        # Tensors with gaps in memory have stand-ins, packed with the others and applied in one go.
        flats = [in_memory_order(t) for t in tensors]
        self._gappy = [t for t, flat in zip(tensors, flats, strict=True) if flat is None]
        self._stand_ins = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in self._gappy]
        stand_ins = iter(self._stand_ins)
        self._flats = [next(stand_ins).view(-1) if flat is None else flat for flat in flats]
        self._layouts: dict[tuple[int, int], _Layout] = {}
        self._routes: dict[Group, _Route] = {}
        self._route: _Route | None = None
        self._lane = Lane()
        self.bytes_sent = 0  # by the latest average
        self.arrivals: Arrivals | None = None  # of the latest average; None if it was a single bucket
        self._done: list[Result] = []

    @torch.no_grad()
    def start(self, members: Group, group: dist.ProcessGroup, lane: Lane) -> None:
        """Pack, and start the average over ``members``.

        Args:
            members: Ranks of the group, in the same order on all of them.
            group: Their process group.
            lane: Where the average goes on.
        """
        done, self._done = self._done, []
        for result in done:  # of an average that nobody finished
            result.result()
        route = self._route = self._routes.get(members) or self._make_route(members, group)
        self._lane, self._current, self._stretched = lane, route.layout, False
        if self._gappy:
            torch._foreach_copy_(self._stand_ins, self._gappy)
        route.layout.padding.zero_()  # a NaN in its block of an 8-bit wire must not stay
        legs = zip_longest(route.layout.buckets, route.first, route.second)
        waits: dict[int, float] = {}
        trips = [_Trip(bucket, first, second, lane.groups_messages, waits) for bucket, first, second in legs]
        trips[0].waits = {}  # for members that began later
        for trip in trips:
            lane.run(trip.receive)
        for bucket, trip in zip(route.layout.buckets, trips, strict=True):
            with record_function("dssync: pack"):
                bucket.pack()
            with record_function("dssync: average"):
                lane.run(trip.send)
        for i, trip in enumerate(trips):
            if route.second:
                # There is room for a rounded mean again when the bucket _AHEAD before it has arrived.
                if i >= _AHEAD:
                    self._done.append(lane.run(trips[i - _AHEAD].arrive))
                lane.run(trip.send_mean)
            else:
                self._done.append(lane.run(trip.arrive))
        self._done += [lane.run(trip.arrive) for trip in trips[len(self._done) :]]
        self.bytes_sent = route.layout.bytes_sent
        self.arrivals = None
        if len(trips) > 1:
            # Of two stages the second begins when all of the first is on its way.
            share = route.layout.after_first / (2 if route.second else 1)
            self.arrivals = Arrivals(self._done[0], self._done[-1], share, route.layout.size, waits)

    @torch.no_grad()
    def finish(self, kept: Sequence[float] | None = None) -> None:
        """Wait for the average and add the difference.

        Args:
            kept: For each tensor, the share of the difference that is added; None: all of it.

        Raises:
            RuntimeError: If a member failed or did not come within the group's timeout.
        """
        assert self._route is not None
        if self._gappy:
            torch._foreach_zero_(self._stand_ins)
        if self._follow is not None:
            self._follow.squares.zero_()
        done, self._done = self._done, []
        of_tensors = None if kept is None else [*kept, 1.0]  # padding comes after them
        for result, bucket in zip(done, self._route.layout.buckets, strict=True):
            with record_function("dssync: wait"), self._lane.waiting():
                result.result()
            with record_function("dssync: apply"):
                bucket.apply(of_tensors, to_base=not self._stretched)
        if self._gappy:
            torch._foreach_add_(self._gappy, self._stand_ins)

    # ---- following changes ------------------------------------------------------------------------------------------

    @property
    def followed(self) -> bool:
        """Whether its changes are."""
        return self._follow is not None

    @property
    def squares(self) -> Tensor:
        """By number, the sum of squares of what the latest average added; overwritten by the next."""
        assert self._follow is not None
        return self._follow.squares[:-1]

    @torch.no_grad()
    def note_base(self) -> None:
        """Let the tensors as they are now be the base, where no average made one."""
        if self._current is None:
            if "nccl" not in dist.get_backend():
                self._room.home = torch.device("cpu")
            self._current = _Layout(self._flats, self._room, 2, 0, self._follow)
            self._layouts[2, 0], self._room.grew = self._current, False
        if self._gappy:
            torch._foreach_copy_(self._stand_ins, self._gappy)
        assert self._follow is not None
        self._follow.squares.zero_()
        for base in self._current.bases:
            base.note()

    @property
    def updates(self) -> Tensor:
        """By number, the sum of squares of what :meth:`stretch` found, and made longer; overwritten by the next."""
        assert self._follow is not None
        return self._follow.updates[:-1]

    @torch.no_grad()
    def stretch(self, stretches: Stretches) -> None:
        """Lengthen what was added to the base; once for each base, before or after :meth:`finish`.

        ``updates`` then are those of what was added, now that it is longer, without what was taken away; of the values
        that :class:`Followed` counts.
        """
        assert self._current is not None
        assert self._follow is not None
        self._stretched = True
        if self._gappy:
            torch._foreach_copy_(self._stand_ins, self._gappy)
        padded = Stretches(*([*values, rest] for values, rest in zip(stretches, (0.0, 0.0, 1.0), strict=True)))
        squares: list[Tensor] = []
        with record_function("dssync: correct noise"):
            # The last values are what the optimizer had in the cache, and the first ones are packed next.
            for base in reversed(self._current.bases):
                squares += base.stretch(padded)
        if self._gappy:
            torch._foreach_copy_(self._gappy, self._stand_ins)
        self._follow.updates.zero_().index_add_(0, self._current.numbers, torch.stack(squares).float())

    def _make_route(self, members: Group, group: dist.ProcessGroup) -> _Route:
        """The messages to and from the members of a group, made once."""
        here = members.index(dist.get_rank())
        if "nccl" not in dist.get_backend(group):
            self._room.home = torch.device("cpu")  # gloo sends from the host's memory only
        key = (len(members), here if len(members) > 2 else 0)
        layout = self._layouts.get(key) or _Layout(self._flats, self._room, *key, self._follow)
        if self._room.grew:  # those of before hold memory that is in use no more
            self._layouts, self._routes, self._room.grew = {}, {}, False
        self._layouts[key] = layout
        others = [rank for i, rank in enumerate(members) if i != here]
        route = self._routes[members] = _Route(layout)
        for i, b in enumerate(layout.buckets):
            tag = (self._channel << 16) + 2 * i
            route.first.append(_Messages(b.own, b.received, others, group, tag))
            if len(others) > 1:
                route.second.append(_Messages([b.rounded] * len(others), b.received, others, group, tag + 1))
        return route


@dataclass(frozen=True)
class Arrivals:
    """When the first and the last bucket of an average arrived: between them nobody waited for a member to begin."""

    first: Result
    last: Result
    share: float  # of all messages, that came after the first bucket
    size: int  # of all values, in bytes as they are sent
    waits: dict[int, float]  # seconds that the lane waited for messages after the first bucket, by the other member

    @property
    def last_member(self) -> int | None:
        """The other member whose messages came last; None where that is not known."""
        return max(self.waits, key=self.waits.__getitem__, default=None)


def seconds_per_byte(arrivals: Sequence[Arrivals]) -> float | None:
    """What averages took that a rank had in the same group at the same time, per byte; None if that is not known yet.

    From the first bucket of all to the last: one of them may have had the link before the others had it.
    """
    begun = arrivals[0].first
    firsts = [seconds for came in arrivals if (seconds := came.first.seconds_since(begun)) is not None]
    lasts = [seconds for came in arrivals if (seconds := came.last.seconds_since(begun)) is not None]
    if len(firsts) + len(lasts) < 2 * len(arrivals):
        return None
    seconds = max(lasts) - min(firsts)
    # First buckets that came when the first of all did; with the link one after the other it is only that one.
    soon = min(firsts) + seconds / len(arrivals) / 2
    before = sum((1 - came.share) * came.size for came, first in zip(arrivals, firsts, strict=True) if first <= soon)
    return seconds / (sum(came.size for came in arrivals) - before)


@dataclass
class _Route:
    """The messages of a payload in one group, by bucket."""

    layout: _Layout
    first: list[_Messages] = field(default_factory=list)
    second: list[_Messages] = field(default_factory=list)  # of groups above two


class _Messages:
    """To and from each other member of a group."""

    def __init__(
        self, sent: list[Tensor], received: list[Tensor], others: list[int], group: dist.ProcessGroup, tag: int
    ) -> None:
        to, back = zip(sent, others, strict=True), zip(received, others, strict=True)
        self.sent = [dist.P2POp(dist.isend, row, rank, group, tag) for row, rank in to]
        self.received = [dist.P2POp(dist.irecv, row, rank, group, tag) for row, rank in back]


class _Trip:
    """A bucket's way through the lane. What fails there is raised when it should arrive.

    Messages are sent by the lane, too, and not only because they may block: a profiler that watches the caller would
    otherwise write down their end, which is often after its own.
    """

    def __init__(
        self,
        bucket: _Bucket,
        first: _Messages,
        second: _Messages | None,
        grouped: bool,
        waits: dict[int, float],
    ) -> None:
        self._bucket, self._first, self._second, self._grouped = bucket, first, second, grouped
        self.waits = waits
        self._works: list[dist.Work] = []
        self._peers: list[int] = []
        self._error: BaseException | None = None

    def receive(self) -> None:
        """Be ready for the others' messages before sending any.

        With gloo a member may send only what it was told to be expected, and this would queue behind one's own data:
        a pair would take turns. With NCCL what is sent and received is one operation.
        """
        if not self._grouped:
            self._post(self._first.received)

    def send(self) -> None:
        self._post(self._first.sent + self._first.received if self._grouped else self._first.sent)

    @torch.no_grad()
    def send_mean(self) -> None:
        assert self._second is not None
        try:
            self._wait()
            self._bucket.average_own_shard()
        except BaseException as error:
            self._error = error
        self._works, self._peers = [], []
        self._post(self._second.received + self._second.sent)

    def _post(self, messages: list[dist.P2POp]) -> None:
        try:
            if self._error is None:
                self._works += dist.batch_isend_irecv(messages)
                self._peers += [message.peer for message in messages]
        except BaseException as error:
            self._error = error

    @torch.no_grad()
    def arrive(self) -> None:
        self._wait()
        self._bucket.subtract()

    def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        begun, each = time.perf_counter(), len(self._works) == len(self._peers)  # or all are one work, as with NCCL
        for i, work in enumerate(self._works):
            work.wait()
            now = time.perf_counter()
            if each:
                self.waits[self._peers[i]] = self.waits.get(self._peers[i], 0.0) + now - begun
            begun = now


class _Room:
    """The memory of a payload's layouts, of which one is in use at a time."""

    def __init__(self, wire: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
        self.codec, self.lanes_codec = codec_for(wire), codec_for(wire)
        self.dtype, self.device, self.home = dtype, device, device
        self.grew = False
        self._held: dict[str, Tensor] = {}

    def raw(self, name: str, n: int) -> Tensor:
        """Bytes to send from, or receive into."""
        return self._take(name, n, torch.uint8, self.home)

    def values(self, name: str, n: int) -> Tensor:
        """Values to compute with."""
        return self._take(name, n, self.dtype, self.device)

    def _take(self, name: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if name not in self._held or self._held[name].numel() < n:
            self._held[name] = torch.empty(n, dtype=dtype, device=device)
            self.grew = True
        return self._held[name][:n]


class _Layout:
    """Where each value lies in the buffers: buckets of rows of tiles.

    A pair's bucket is one row, swapped. In a larger group it is a row for each member: its shard.
    """

    def __init__(self, flats: list[Tensor], room: _Room, size: int, here: int, follow: Followed | None = None) -> None:
        codec = room.codec
        shards = 1 if size == 2 else size
        unit = shards * codec.block
        total = sum(flat.numel() for flat in flats)
        most = min(max(-(-total // _BUCKETS), _SMALLEST_BUCKET), _LARGEST_BUCKET)
        number = -(-total // most)
        bucket = -(-total // (number * unit)) * unit  # all about the same
        lengths = [bucket] * (total // bucket) + [-(-(total % bucket) // unit) * unit] * (total % bucket > 0)
        self.padding = room.values("padding", sum(lengths) - total).zero_()
        values = _Cutter([*flats, self.padding])
        row_bytes = [codec.nbytes(n // shards) for n in lengths]
        others = size - 1
        own_rows, received_rows = (_Cutter([room.raw(name, others * sum(row_bytes))]) for name in ("own", "received"))
        kept = _Cutter([room.values("kept", sum(lengths) // shards if shards > 1 else 0)])
        rounded = [room.raw(f"rounded {i}", max(row_bytes) if shards > 1 else 0) for i in range(_AHEAD)]
        # What is sent in full precision is the base's place.
        exact = codec.direct and codec.dtype == room.dtype and room.home == room.device
        on_cpu = _EXACT_TILE_ON_CPU if exact else _TILE_ON_CPU
        tile = min(on_cpu if room.device.type == "cpu" else _TILE_ON_GPU, bucket // shards)
        scratch = [room.values(f"scratch {i}", tile) for i in range(2)]
        # The lane averages shards while the caller packs and applies: it has scratch of its own.
        lanes_scratch = [room.values(f"lane's scratch {i}", tile if shards > 1 else 0) for i in range(2)]
        not_sent = sum(lengths) // shards if shards > 1 else 0
        bases = _Cutter([room.values("base", 0 if follow is None else not_sent if exact else sum(lengths))])
        self.bytes_sent = sum(row_bytes) * (1 if shards == 1 else 2 * others)
        self.size = shards * sum(row_bytes)
        self.after_first = 1 - lengths[0] / sum(lengths)
        self.buckets: list[_Bucket] = []
        for i, (n, nbytes) in enumerate(zip(lengths, row_bytes, strict=True)):
            b = _Bucket(
                own=[own_rows.cut(nbytes)[0] for _ in range(others)],
                received=[received_rows.cut(nbytes)[0] for _ in range(others)],
                rounded=rounded[i % _AHEAD][:nbytes],
            )
            row = n // shards
            rows = zip(b.own, b.received, strict=True)
            for shard in range(shards):
                if shards > 1 and shard == here:
                    codes = [Code(codec, raw, row) for raw in b.received]
                    mean = Code(codec, b.rounded, row)
                    for start in range(0, row, tile):
                        stop = min(start + tile, row)
                        pieces, own_values = values.cut(stop - start), kept.cut(stop - start)[0]
                        base = None
                        if follow is not None:
                            base = _Base(pieces, bases.cut(stop - start)[0], scratch, follow, values.latest)
                        b.tiles.append(_OwnTile(pieces, own_values, base, values.latest))
                        parts = [code.part(start, stop) for code in codes]
                        rest = mean.part(start, stop), room.lanes_codec, lanes_scratch
                        b.shard.append(_ShardTile(own_values, parts, *rest))
                    continue
                mine, theirs = (Code(codec, raw, row) for raw in next(rows))
                for start in range(0, row, tile):
                    stop = min(start + tile, row)
                    pieces = values.cut(stop - start)
                    own_code, received_code = mine.part(start, stop), theirs.part(start, stop)
                    weight = 0.5 if shards == 1 else 1.0
                    base = None
                    if follow is not None:
                        place = own_code.parts[0] if exact else bases.cut(stop - start)[0]
                        base = _Base(pieces, place, scratch, follow, values.latest)
                    of = values.latest
                    b.tiles.append(_SentTile(pieces, own_code, received_code, codec, scratch, weight, base, of))
            self.buckets.append(b)
        if follow is not None:
            self.bases = [tile.base for b in self.buckets for tile in b.tiles if tile.base is not None]
            self.numbers = torch.cat([base.index for base in reversed(self.bases)])


@dataclass
class _Bucket:
    """What travels at a time: the rows sent to and received from each other member, and the tiles they are made of."""

    own: list[Tensor]
    received: list[Tensor]
    rounded: Tensor  # the mean of this rank's shard, as it is sent
    tiles: list[_OwnTile | _SentTile] = field(default_factory=list)
    shard: list[_ShardTile] = field(default_factory=list)

    def pack(self) -> None:
        for tile in self.tiles:
            tile.pack()

    def average_own_shard(self) -> None:
        for tile in self.shard:
            tile.average()

    def subtract(self) -> None:
        for tile in self.tiles:
            tile.subtract()

    def apply(self, kept: Sequence[float] | None, to_base: bool) -> None:
        for tile in self.tiles:
            tile.apply(kept, to_base)


class _Base:
    """What the updates of a tile's values are added to."""

    def __init__(
        self, pieces: list[Tensor], place: Tensor, scratch: list[Tensor], follow: Followed, cut_from: list[int]
    ) -> None:
        n = sum(piece.numel() for piece in pieces)
        self._pieces, self._place, self._scratch, self._follow = pieces, place, scratch[0][:n], follow
        self._views, self._changes, self._capped = (_like(of, pieces) for of in (place, self._scratch, scratch[1][:n]))
        self._numbers = [follow.numbers[i] for i in cut_from]
        self.index = torch.tensor(self._numbers, device=follow.squares.device)
        # Kernels for many tensors save launches on a GPU, and cost passes elsewhere.
        self._one_by_one = len(pieces) == 1 or follow.squares.device.type == "cpu"
        self._told = []
        for piece, base, change in zip(self._pieces, self._views, self._changes, strict=True):
            told = _told(piece)
            flat = change[: told.numel()]
            self._told.append((told, _told(base), flat.view(told.shape), flat))

    def is_in(self, code: Code) -> bool:
        """Whether it has its place there."""
        return self._place is code.parts[0]

    def note(self) -> None:
        torch._foreach_copy_(self._views, self._pieces)

    def averaged(self, difference: Tensor, parts: list[Tensor], weight: float, to_base: bool) -> None:
        """An average is added to the values, and belongs to the base as long as somebody asks for that."""
        if to_base:
            self._place.add_(difference, alpha=weight)
        if self._one_by_one:
            for number, part in zip(self._numbers, parts, strict=True):
                told = _told(part).reshape(-1)
                self._follow.of_averages[number].add_(torch.dot(told, told), alpha=weight**2)
        else:
            self._follow.squares.index_add_(0, self.index, torch.stack(_squares(parts)).float(), alpha=weight**2)

    def stretch(self, by: Stretches) -> list[Tensor]:
        """Returns the squares of each piece's changes, now longer."""
        if self._one_by_one:
            squares = []
            for number, piece, base, change, told in zip(
                self._numbers, self._pieces, self._views, self._changes, self._told, strict=True
            ):
                factor, limit, kept = by.factors[number], by.limits[number], by.kept[number]
                if factor > 0:
                    torch.add(piece, base, alpha=-kept, out=change)
                    piece.add_(change.clamp_(-limit, limit), alpha=factor)
                piece, base, change, flat = told
                torch.add(piece, base, alpha=-kept, out=change)
                squares.append(torch.dot(flat, flat))
            return squares
        factors, limits, of_bases = ([values[i] for i in self._numbers] for values in by)
        self._scratch.copy_(self._place)
        torch._foreach_mul_(self._changes, [-kept for kept in of_bases])
        torch._foreach_add_(self._changes, self._pieces)
        torch._foreach_copy_(self._capped, self._changes)
        torch._foreach_clamp_min_(self._capped, [-limit for limit in limits])
        torch._foreach_clamp_max_(self._capped, limits)
        torch._foreach_mul_(self._capped, factors)
        torch._foreach_add_(self._pieces, self._capped)
        torch._foreach_add_(self._changes, self._capped)
        return _squares(self._changes)


def _told(piece: Tensor) -> Tensor:
    """What of it tells how far all of it moved: on a CPU runs of values, evenly spread; shape (runs, values)."""
    step = piece.numel() // _RUNS
    if step <= _RUN or piece.device.type != "cpu":
        return piece.view(1, -1)
    return piece[: _RUNS * step].view(_RUNS, step)[:, :_RUN]


def _squares(parts: list[Tensor]) -> list[Tensor]:
    norms = list(torch._foreach_norm(parts))
    torch._foreach_mul_(norms, norms)
    return norms


class _SentTile:
    """Values whose rounded copy goes to another member; that member's, or the rounded mean, comes back."""

    def __init__(
        self,
        pieces: list[Tensor],
        own: Code,
        received: Code,
        codec: Any,
        scratch: list[Tensor],
        weight: float,
        base: _Base | None,
        cut_from: list[int],
    ) -> None:
        self.base, self._cut_from = base, cut_from
        self._notes_base = base is not None and not base.is_in(own)  # what is sent is not it
        n = sum(piece.numel() for piece in pieces)
        self._pieces, self._own, self._received, self._codec, self._weight = pieces, own, received, codec, weight
        self._scratch, self._other = scratch[0][:n], scratch[1][:n]
        self._views = _like(self._scratch, pieces)
        self._direct = _like(own.parts[0], pieces) if codec.direct else None
        # What came in full precision can become the difference where it is.
        place = received.parts[0]
        full = (place.dtype, place.device) == (self._scratch.dtype, self._scratch.device)
        self._in_place = _like(place, pieces) if full else None

    def pack(self) -> None:
        if self._direct is not None:
            torch._foreach_copy_(self._direct, self._pieces)
        else:
            torch._foreach_copy_(self._views, self._pieces)
            self._codec.encode(self._scratch, self._own)
        if self.base is not None and self._notes_base:
            self.base.note()

    def subtract(self) -> None:
        if self._in_place is not None:
            self._received.parts[0].sub_(self._own.parts[0])

    def apply(self, kept: Sequence[float] | None, to_base: bool) -> None:
        difference, parts = self._received.parts[0], self._in_place
        if parts is None:
            self._codec.decode(self._received, self._scratch)
            self._codec.decode(self._own, self._other)
            difference, parts = self._scratch.sub_(self._other), self._views
        if self.base is not None:
            self.base.averaged(difference, parts, self._weight, to_base)
        _add(self._pieces, parts, self._weight, self._cut_from, kept)


class _OwnTile:
    """Values of the shard that this rank averages: kept in full precision until the difference takes their place."""

    def __init__(self, pieces: list[Tensor], kept: Tensor, base: _Base | None, cut_from: list[int]) -> None:
        self._pieces, self._kept, self._views, self.base = pieces, kept, _like(kept, pieces), base
        self._cut_from = cut_from

    def pack(self) -> None:
        torch._foreach_copy_(self._views, self._pieces)
        if self.base is not None:
            self.base.note()

    def subtract(self) -> None:
        """The lane has done it."""

    def apply(self, kept: Sequence[float] | None, to_base: bool) -> None:
        if self.base is not None:
            self.base.averaged(self._kept, self._views, 1.0, to_base)
        _add(self._pieces, self._views, 1.0, self._cut_from, kept)


def _add(
    pieces: list[Tensor], parts: list[Tensor], weight: float, cut_from: list[int], kept: Sequence[float] | None
) -> None:
    """The difference, or of each tensor's the share that is kept."""
    shares = {1.0} if kept is None else {kept[i] for i in cut_from}
    if kept is not None and len(shares) > 1:
        torch._foreach_mul_(parts, [kept[i] for i in cut_from])
        shares = {1.0}
    torch._foreach_add_(pieces, parts, alpha=weight * shares.pop())


class _ShardTile:
    """The same values in the lane, between the two stages."""

    def __init__(self, kept: Tensor, received: list[Code], mean: Code, codec: Any, scratch: list[Tensor]) -> None:
        self._kept, self._received, self._mean, self._codec = kept, received, mean, codec
        self._sum, self._other = (s[: kept.numel()] for s in scratch)

    def average(self) -> None:
        size = len(self._received) + 1
        self._sum.copy_(self._kept)
        for copy in self._received:
            self._codec.decode(copy, self._other)
            self._sum.add_(self._other)
        self._sum.div_(size)
        self._other.copy_(self._sum)
        self._codec.encode(self._other, self._mean)
        self._codec.decode(self._mean, self._other)
        # What is kept becomes `rounded mean - own + g (mean - rounded mean)`.
        self._kept.neg_().add_(self._other).add_(self._sum.sub_(self._other), alpha=size)


class _Cutter:
    """Cuts consecutive stretches off a row of flat tensors."""

    def __init__(self, flats: list[Tensor]) -> None:
        self._flats, self._at = [(i, flat) for i, flat in enumerate(flats) if flat.numel()], 0
        self.latest: list[int] = []  # from which of them the latest pieces were cut

    def cut(self, n: int) -> list[Tensor]:
        """Views of the next ``n`` values."""
        pieces, self.latest = [], []
        while n:
            number, flat = self._flats[0]
            piece = flat[self._at : self._at + n]
            pieces.append(piece)
            self.latest.append(number)
            n -= piece.numel()
            self._at += piece.numel()
            if self._at == flat.numel():
                self._flats.pop(0)
                self._at = 0
        return pieces


def in_parts(tensors: Sequence[Tensor], parts: int) -> list[list[Tensor]]:
    """Tensors cut into parts of equally many values, in the order of memory; one with gaps in it is not cut."""
    if parts == 1:
        return [list(tensors)]
    total, at = sum(t.numel() for t in tensors), 0
    found: list[list[Tensor]] = [[] for _ in range(parts)]
    for tensor in tensors:
        flat, start = in_memory_order(tensor), 0
        while flat is not None and start < flat.numel():
            part = (at + start) * parts // total
            stop = min(-(-total * (part + 1) // parts) - at, flat.numel())
            found[part].append(flat[start:stop])
            start = stop
        if flat is None:
            found[at * parts // total].append(tensor)
        at += tensor.numel()
    return found


def _like(flat: Tensor, pieces: list[Tensor]) -> list[Tensor]:
    return list(flat.split([piece.numel() for piece in pieces]))


def in_memory_order(tensor: Tensor) -> Tensor | None:
    """A flat view of a tensor without gaps, such as one in channels-last order, else ``None``."""
    ordered = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return ordered.view(-1) if ordered.is_contiguous() else None
