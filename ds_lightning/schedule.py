"""WHO averages with whom at step t. Pure Python: no torch, no process group, usable by a simulator for 10^5 ranks.

Words used everywhere in this package (N is the world size, g the group size):

* **group**: ranks that average their parameters together at one step.
* **partition**: all groups of one step; every rank is in exactly one of them.
* **schedule**: a partition for every step ``t``, repeating after ``period`` steps.
* **mixing matrix** ``W_t``: block-diagonal with ``1/|G|`` inside each group ``G``; the synchronization is
  ``X <- W_t X`` with one row of ``X`` per rank (DS-Sync, arXiv 2007.03298, section 3). It is doubly stochastic, so the
  mean over ranks never changes.
* **consensus**: all replicas equal to their mean, that is, the product of the mixing matrices is ``J/N``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Group = tuple[int, ...]
Partition = tuple[Group, ...]

# All partitions of a period are looked at before training.
_LONGEST_PERIOD = 10_000
# Each is sent with its own messages.
MOST_PARTS = 16
# A schedule without a `period` is looked at for this many steps; it must repeat within half of them.
_PROBED_STEPS = 512


@runtime_checkable
class Schedule(Protocol):
    """Who averages with whom at every step.

    Anything with these three members is a schedule. Ranks must agree: the answers may depend on the arguments alone.
    Partitions must repeat, because the process groups are all made before training: say after how many steps in an
    integer attribute ``period``, or repeat within 256 steps, where it is found.
    """

    @property
    def world_size(self) -> int:
        """Number of ranks N."""
        ...

    def partition(self, step: int) -> Partition:
        """All groups of ``step``, each a sorted tuple of ranks; together every rank exactly once."""
        ...

    def group(self, rank: int, step: int) -> Group:
        """The group of ``rank`` at ``step``: the one of ``partition(step)`` that has it, found without building it."""
        ...


class GridSchedule:
    """Lines of a k-dimensional grid: exact consensus after any k consecutive steps.

    The world size is written as ``N = g1 * g2 * ... * gk`` and rank r sits at its row-major (mixed radix) coordinates.
    At step t the groups are the lines along axis ``t mod k``. They are the 1-d submeshes of a
    ``torch.distributed.device_mesh.DeviceMesh`` of shape ``dims``, and a rank belongs to k groups only.

    ``group_size`` is used as a factor as often as it divides N and the rest is split into factors as near to it as N
    allows. So every N has a grid; for a prime N it is one group of everybody. ``dims`` says what came out.

    Where the node of each rank is known, ranks take their places in the grid node by node, whatever their order, and
    the last axes are those whose lines fit into a node: as many groups as can be had exchange nothing between nodes.

    Args:
        world_size: Number of ranks N, at least 1.
        group_size: Target group size g, from 2 to N (anything from 1 at N = 1).
        nodes: The node of each rank, by whatever name; the same on all ranks.

    Raises:
        ValueError: If a number is not an integer or out of range, or there is not one node for each rank.

    Example:
        >>> GridSchedule(4, 2).partition(0), GridSchedule(4, 2).partition(1)
        (((0, 2), (1, 3)), ((0, 1), (2, 3)))
        >>> GridSchedule(12, 4).dims
        (4, 3)
        >>> GridSchedule(4, 2, nodes="abab").partition(1)
        ((0, 2), (1, 3))
    """

    def __init__(self, world_size: int, group_size: int, nodes: Sequence[Hashable] | None = None) -> None:
        self.world_size = positive_int("world_size", world_size)
        self.group_size = check_group_size(group_size, self.world_size)
        self.dims = _grid_dims(self.world_size, self.group_size)
        self.period = len(self.dims)
        self._nodes: Group | None = None  # numbered, if they change anything
        self._ranks: list[int] | None = None  # at each place of the grid
        self._places: list[int] | None = None  # of each rank
        if nodes is not None:
            self._put_on(nodes)

    def _put_on(self, nodes: Sequence[Hashable]) -> None:
        if len(nodes) != self.world_size:
            raise ValueError(
                f"nodes has {len(nodes)} entries for {self.world_size} ranks. HINT: give one for each rank."
            )
        number = {node: i for i, node in enumerate(dict.fromkeys(nodes))}
        numbers = tuple(number[node] for node in nodes)
        dims = _dims_within(self.dims, math.gcd(*Counter(numbers).values()))
        ranks = sorted(range(self.world_size), key=numbers.__getitem__)
        if (dims, ranks) != (self.dims, [*range(self.world_size)]):
            self.dims, self._ranks, self._nodes = dims, ranks, numbers
            self._places = sorted(range(self.world_size), key=ranks.__getitem__)

    @property
    def is_near(self) -> bool:
        """Whether no group has more than twice as many ranks as were asked for."""
        return max(self.dims) <= 2 * self.group_size

    def group(self, rank: int, step: int) -> Group:
        """The line through ``rank`` along axis ``step mod k``; O(g)."""
        _check_rank(rank, self.world_size)
        return self._line(rank if self._places is None else self._places[rank], step)

    def _line(self, place: int, step: int) -> Group:
        axis = step % self.period
        stride = math.prod(self.dims[axis + 1 :])
        first = place - (place // stride % self.dims[axis]) * stride
        line = range(first, first + self.dims[axis] * stride, stride)
        return tuple(line) if self._ranks is None else tuple(sorted(self._ranks[p] for p in line))

    def partition(self, step: int) -> Partition:
        """All lines along axis ``step mod k``."""
        axis = step % self.period
        stride = math.prod(self.dims[axis + 1 :])
        firsts = (p for p in range(self.world_size) if p // stride % self.dims[axis] == 0)
        return tuple(self._line(first, step) for first in firsts)

    def __repr__(self) -> str:
        nodes = "" if self._nodes is None else f", nodes={self._nodes}"
        return f"GridSchedule(world_size={self.world_size}, group_size={self.group_size}{nodes})"


class ShuffleSchedule:
    """Seeded random partitions into groups of nearly equal size, for every N (primes included).

    At step t the ranks are permuted and cut into groups whose sizes differ by at most one. No rank is ever alone:
    where g does not divide N some groups have one rank more, and two groups of N = 3 ranks become one of three.
    The partitions are a fixed pool of ``POOL_SIZE``, used in turn, so that a rank belongs to at most that many groups
    and as many communicators. The seed is advanced until the pool as a whole connects all ranks.

    Args:
        world_size: Number of ranks N, at least 1.
        group_size: Target group size g, from 2 to N (anything from 1 at N = 1).
        seed: Seed of the permutations; must be the same on all ranks.

    Raises:
        ValueError: If an argument is not an integer or out of range.

    Example:
        >>> [len(group) for group in ShuffleSchedule(7, 2, seed=0).partition(3)]
        [3, 2, 2]
    """

    POOL_SIZE = 8

    def __init__(self, world_size: int, group_size: int, seed: int = 0) -> None:
        self.world_size = positive_int("world_size", world_size)
        self.group_size = check_group_size(group_size, self.world_size)
        self.seed = as_int("seed", seed)
        groups = max(1, min(round(self.world_size / self.group_size), self.world_size // 2))
        self._size, self._larger = divmod(self.world_size, groups)  # `_larger` groups have one rank more
        self.period = 1 if groups == 1 else self.POOL_SIZE
        self._salt = 0
        # Beyond this size an unconnected pool is not met in practice (two ranks that only ever meet each other: about
        # N^-6 for pairs), and looking for one would cost O(N) where a simulator asks for a single group.
        if self.world_size <= 1024:
            while not self._connected():
                self._salt += 1

    def group(self, rank: int, step: int) -> Group:
        """The group of ``rank`` in partition ``step mod period`` of the pool; O(g)."""
        _check_rank(rank, self.world_size)
        permutation = self._permutation(step)
        position = permutation.position(rank)
        boundary = self._larger * (self._size + 1)
        if position < boundary:
            size = self._size + 1
            first = position - position % size
        else:
            size = self._size
            first = position - (position - boundary) % size
        return tuple(sorted(permutation.at(p) for p in range(first, first + size)))

    def partition(self, step: int) -> Partition:
        """All groups of partition ``step mod period``, larger ones first."""
        permutation = self._permutation(step)
        groups: list[Group] = []
        first = 0
        while first < self.world_size:
            size = self._size + (len(groups) < self._larger)
            groups.append(tuple(sorted(permutation.at(p) for p in range(first, first + size))))
            first += size
        return tuple(groups)

    def _permutation(self, step: int) -> _Permutation:
        return _Permutation(self.world_size, key=_mix(_mix(_mix(self.seed) + self._salt) + step % self.period))

    def _connected(self) -> bool:
        root = list(range(self.world_size))
        for t in range(self.period):
            for group in self.partition(t):
                roots = {root[r] for r in group}
                if len(roots) > 1:
                    root = [min(roots) if r in roots else r for r in root]
        return len(set(root)) == 1

    def __repr__(self) -> str:
        return f"ShuffleSchedule(world_size={self.world_size}, group_size={self.group_size}, seed={self.seed})"


class CyclicSchedule:
    """A list of partitions, used in turn: what a planner found, or a user wrote down.

    With ``parts > 1`` the parameters are cut into that many equal parts, and in step ``t`` part ``q`` is averaged in
    partition ``t + q``. Each part goes through the same partitions, at another time than the others: what a slow link
    has to carry in one of them is spread over ``parts`` steps.

    Args:
        partitions: One after the other, at least one; each has every rank 0 to N-1 exactly once.
        parts: How many, 1 to 16.

    Raises:
        ValueError: If there is no partition, one of them is none of the same ranks, or ``parts`` is out of range.

    Example:
        >>> CyclicSchedule([[(0, 1), (2,)], [(0,), (1, 2)]]).group(2, step=3)
        (1, 2)
    """

    def __init__(self, partitions: Sequence[Sequence[Sequence[int]]], parts: int = 1) -> None:
        try:
            self._partitions = tuple(
                tuple(tuple(sorted(as_int("rank", rank) for rank in group)) for group in partition)
                for partition in partitions
            )
        except TypeError:
            raise ValueError(
                f"partitions={partitions!r:.80} is no list of lists of groups. HINT: write [[(0, 1), (2,)]]."
            ) from None
        if not self._partitions or not all(partition and all(partition) for partition in self._partitions):
            raise ValueError(
                "partitions is empty, or has an empty one or an empty group. HINT: give each rank a group."
            )
        self.parts = positive_int("parts", parts)
        if self.parts > MOST_PARTS:
            raise ValueError(f"parts={self.parts} is too large. HINT: use 1 to {MOST_PARTS}.")
        self.period = len(self._partitions)
        self.world_size = sum(map(len, self._partitions[0]))
        self._groups: list[dict[int, Group]] = [
            {rank: group for group in partition for rank in group} for partition in self._partitions
        ]
        everybody = [*range(self.world_size)]
        if any(sorted(itertools.chain(*partition)) != everybody for partition in self._partitions):
            check_schedule(self)  # which says what is wrong

    def group(self, rank: int, step: int) -> Group:
        """The group of ``rank`` in partition ``step mod period``; O(1)."""
        _check_rank(rank, self.world_size)
        return self._groups[step % self.period][rank]

    def partition(self, step: int) -> Partition:
        """Partition ``step mod period``."""
        return self._partitions[step % self.period]

    def __repr__(self) -> str:
        digest = hashlib.sha256(repr(self._partitions).encode()).hexdigest()
        parts = f" in {self.parts} parts" if self.parts > 1 else ""
        return f"CyclicSchedule({self.period} partitions of {self.world_size} ranks{parts}, {digest[:8]})"


class _Permutation:
    """A keyed pseudo-random permutation of 0..n-1 in O(1) memory, so that one group costs no walk over all ranks.

    A balanced Feistel network over the next power of four, walked until the value falls inside 0..n-1.
    """

    _ROUNDS = 6

    def __init__(self, n: int, key: int) -> None:
        self._n = n
        self._bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._bits) - 1
        self._keys = [_mix(key + i + 1) for i in range(self._ROUNDS)]

    def at(self, position: int) -> int:
        while True:
            left, right = position >> self._bits, position & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._mask)
            position = left << self._bits | right
            if position < self._n:
                return position

    def position(self, value: int) -> int:
        while True:
            left, right = value >> self._bits, value & self._mask
            for key in reversed(self._keys):
                left, right = right ^ (_mix(left ^ key) & self._mask), left
            value = left << self._bits | right
            if value < self._n:
                return value


def _mix(x: int) -> int:
    """A 64-bit integer hash (the finalizer of splitmix64), the same on every machine and Python."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def make_schedule(
    schedule: str | Schedule,
    world_size: int,
    group_size: int | str = "auto",
    seed: int = 0,
    nodes: Sequence[Hashable] | None = None,
) -> Schedule:
    """The schedule that the strategy's options ask for.

    Args:
        schedule: ``"grid"``, ``"shuffle"``, a :class:`Schedule` (returned as it is), or ``"auto"``: a grid where the
            world size factors into groups of at most twice ``group_size``, else a shuffle.
        world_size: Number of ranks N.
        group_size: Target group size, or ``"auto"``: 2 up to 8 ranks, about the square root of N beyond, at most
            32.
        seed: Seed of a shuffle.
        nodes: The node of each rank, by which a grid is laid out.

    Raises:
        ValueError: If a name is unknown, a number out of range, or a schedule was made for another world size.
    """
    check_schedule_name(schedule)
    if schedule == "topology":
        raise ValueError(
            "schedule='topology' needs a network to plan for. HINT: use ds_lightning.planner.plan(topology, size), or"
            " DSSyncStrategy(schedule='topology', topology=...)."
        )
    if not isinstance(schedule, str):
        if schedule.world_size != world_size:
            raise ValueError(
                f"schedule={schedule!r} is for {schedule.world_size} ranks but the world size is {world_size}."
                f" HINT: make it for {world_size} ranks, or pass a name such as schedule='auto'."
            )
        return schedule
    size = auto_group_size(world_size) if group_size == "auto" else check_group_size(group_size, world_size)
    if schedule == "shuffle":
        return ShuffleSchedule(world_size, size, seed)
    grid = GridSchedule(world_size, size, nodes)
    if schedule == "grid" or grid.is_near:
        return grid
    return ShuffleSchedule(world_size, size, seed)


SCHEDULE_NAMES = ("auto", "grid", "shuffle", "topology")


def check_schedule_name(name: Any) -> None:
    """Raise a ``ValueError`` unless ``name`` is that of a schedule, or a :class:`Schedule` itself."""
    if not isinstance(name, str):
        if not isinstance(name, Schedule):
            raise ValueError(
                f"schedule={name!r} is no schedule: it needs `world_size`, `partition(step)` and `group(rank, step)`."
                f" HINT: use one of {', '.join(map(repr, SCHEDULE_NAMES))}."
            )
        return
    if name not in SCHEDULE_NAMES:
        raise ValueError(
            f"schedule={name!r} is unknown. HINT: use one of {', '.join(map(repr, SCHEDULE_NAMES))} or a Schedule."
        )


def auto_group_size(world_size: int) -> int:
    """2 up to 8 ranks, about the square root of N beyond (4 at 16, 8 at 64), 32 from N = 1,024 on.

    With larger ones the connections of groups would grow as N^1.5; and a member sends 2 (g - 1) messages per bucket.
    """
    return min(world_size, 2 if world_size <= 8 else round(math.sqrt(world_size)), 32)


def check_group_size(group_size: Any, world_size: int) -> int:
    """``group_size`` as an int, or a ``ValueError`` if it is none or cannot be used at this world size."""
    size = as_int("group_size", group_size)
    if world_size == 1 and size >= 1:
        return size  # one rank has nothing to average, whatever the group size
    if size < 2:
        why = "a group of one averages nothing, so replicas would drift apart" if size == 1 else "groups have members"
        raise ValueError(f"group_size={size} is too small: {why}. HINT: use 2 to {world_size}, or 'auto'.")
    if size > world_size:
        raise ValueError(
            f"group_size={size} is larger than the world size {world_size}."
            f" HINT: use 2 to {world_size} ({world_size}: everybody averages with everybody), or 'auto'."
        )
    return size


def schedule_period(schedule: Schedule) -> int:
    """Steps after which the partitions repeat: the schedule's own ``period``, or found by looking at 512 steps.

    Raises:
        ValueError: If ``period`` is no positive integer or too large, or there is none and the partitions do not repeat
            in time.
    """
    if (period := getattr(schedule, "period", None)) is not None:
        number = positive_int("period of the schedule", period)
        if number > _LONGEST_PERIOD:
            raise ValueError(
                f"period of the schedule={number} is too large: all partitions are looked at before training. HINT: use"
                f" at most {_LONGEST_PERIOD}, and cycle through a fixed pool of partitions."
            )
        return number
    table = [tuple(schedule.partition(t)) for t in range(_PROBED_STEPS)]
    for period in range(1, _PROBED_STEPS // 2 + 1):
        if table[period:] == table[:-period]:
            return period
    raise ValueError(
        f"schedule={schedule!r} does not repeat within {_PROBED_STEPS // 2} steps, and process groups must all be made"
        " before training. HINT: cycle through a fixed pool of partitions and give the schedule an int `period`."
    )


def schedule_parts(schedule: Schedule) -> int:
    """Parts of the parameters, of which part ``q`` is averaged in partition ``t + q`` of step ``t``; usually one."""
    return positive_int("parts of the schedule", getattr(schedule, "parts", 1))


def check_schedule(schedule: Schedule) -> None:
    """Raise a ``ValueError`` unless every partition covers each rank exactly once and ``group`` agrees with it."""
    world = schedule.world_size
    for t in range(schedule_period(schedule)):
        seen: set[int] = set()
        for group in schedule.partition(t):
            for rank in group:
                if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world:
                    raise ValueError(
                        f"schedule={schedule!r} has rank {rank!r} in group {group} of step {t}."
                        f" HINT: ranks are the integers 0 to {world - 1}."
                    )
                if rank in seen:
                    raise ValueError(
                        f"schedule={schedule!r} has rank {rank} in two groups of step {t}: {schedule.partition(t)}."
                        " HINT: the groups of one step must not overlap."
                    )
                seen.add(rank)
        if missing := sorted(set(range(world)) - seen):
            raise ValueError(
                f"schedule={schedule!r} leaves out ranks {missing} at step {t}: {schedule.partition(t)}."
                " HINT: put a rank that shall not average into a group of its own."
            )
        for group in schedule.partition(t):
            for rank in group:
                if sorted(schedule.group(rank, t)) != sorted(group):
                    raise ValueError(
                        f"schedule={schedule!r} contradicts itself at step {t}: group({rank}, {t}) is"
                        f" {schedule.group(rank, t)} but the partition has {group}. HINT: derive one from the other."
                    )


def mixing_matrix(schedule: Schedule, step: int) -> NDArray[np.float64]:
    """``W_t``: shape (N, N), float64, ``1/|G|`` where two ranks share a group G of ``step``, else 0.

    Of a schedule in parts ``W_{t+q}`` is what part q is averaged by.
    """
    import numpy as np

    matrix = np.zeros((schedule.world_size, schedule.world_size))
    for group in schedule.partition(step):
        matrix[np.ix_(group, group)] = 1 / len(group)
    return matrix


def consensus_rate(schedule: Schedule) -> float:
    """Factor by which the schedule shrinks the consensus distance per step, at worst, averaged over one period.

    That is ``||W_{p-1} ... W_1 W_0 - J/N||_2 ** (1/p)`` for the period p. 0.0 means exact consensus within a period,
    1.0 that some disagreement is never averaged away. Of a schedule in parts it is that of each part.
    """
    import numpy as np

    period = schedule_period(schedule)
    product = np.eye(schedule.world_size)
    for t in range(period):
        product = mixing_matrix(schedule, t) @ product
    norm = float(np.linalg.norm(product - 1 / schedule.world_size, ord=2))
    return 0.0 if norm < 1e-12 else norm ** (1 / period)


def _grid_dims(world_size: int, group_size: int) -> tuple[int, ...]:
    """Factors of ``world_size``: ``group_size`` as often as it divides, the rest as near to it as possible."""
    if world_size == 1:
        return (1,)
    dims, rest = [], world_size
    while rest % group_size == 0:
        dims.append(group_size)
        rest //= group_size

    def key(factors: tuple[int, ...]) -> tuple[bool, float, int]:
        # More than log_g(N) axes would cost more process groups than exact groups of g. The distance is rounded, so
        # that 2 and 8 are equally far from 4 and the smaller number of axes decides.
        too_many = group_size ** (len(dims) + len(factors) - 1) >= world_size
        return too_many, round(max(abs(math.log(f / group_size)) for f in factors), 9), len(factors)

    if rest > 1:
        best: tuple[int, ...] = min(_factorizations(rest, 2), key=key)
        dims += best
    return tuple(sorted(dims, reverse=True))


def _dims_within(dims: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """``dims``, last those whose product divides ``ranks``: as large a product as there is."""
    choices = (within for k in range(len(dims) + 1) for within in combinations(dims, k))
    last = max((within for within in choices if ranks % math.prod(within) == 0), key=math.prod)
    return (*(Counter(dims) - Counter(last)).elements(), *last)


def _factorizations(n: int, smallest: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``n`` as a product of non-decreasing factors >= ``smallest``."""
    yield (n,)
    for factor in range(smallest, math.isqrt(n) + 1):
        if n % factor == 0:
            yield from ((factor, *others) for others in _factorizations(n // factor, factor))


def as_int(name: str, value: Any) -> int:
    """``value`` as an int, or a ``ValueError`` naming it; a bool (a tensor's too) or a float is none."""
    try:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        return operator.index(value)
    except TypeError:
        hint = f"{name}={int(value)}" if isinstance(value, float) and value.is_integer() else "a whole number"
        raise ValueError(f"{name}={value!r} is not an int but a {type(value).__name__}. HINT: use {hint}.") from None


def positive_int(name: str, value: Any) -> int:
    """``value`` as an int of at least 1, or a ``ValueError`` naming it."""
    number = as_int(name, value)
    if number < 1:
        raise ValueError(f"{name}={number} is too small. HINT: use 1 or more.")
    return number


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside the world. HINT: ranks are the integers 0 to {world_size - 1}.")
