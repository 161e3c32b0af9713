"""An all-reduce by racks, as a communication hook of DDP: most bytes stay inside a rack, the fewest cross its trunk."""

# No postponed annotations here: DDP looks at a hook's own.
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from ds_lightning.topology import Topology


def racks_of(topology: Topology) -> list[list[int]]:
    """The ranks with the same switch above their hosts, in the order of their first ranks.

    >>> racks_of(Topology.flat(["h0", "h1", "h2"], bandwidth=25))
    [[0, 1, 2]]
    """
    racks: dict[str, list[int]] = {}
    for rank, host in enumerate(topology.host_of):
        racks.setdefault(topology.above[host], []).append(rank)
    return list(racks.values())


class HierarchicalMean:
    """The mean over all ranks in three stages: in the rack, across racks, in the rack again.

    Each rack reduces, along a ring, so that each of its members holds a shard; the ranks of different racks that hold
    the same values all-reduce them; each rack gathers its shards. A member of a rack of c sends ``2 (c - 1) / c`` of
    the gradients inside it, and ``2 (r - 1) / r`` of its shard to the other r - 1 racks. Racks may be unlike: then
    shards are, too, and a rank shares its own with several ranks of another rack, part by part.

    Use one per process and as its `hook`. Making it is collective.

    Args:
        racks: The ranks of each rack; over all racks, each of 0 to N-1 exactly once, the same on all ranks.
        timeout: Of each collective.

    Raises:
        ValueError: If the racks do not have each rank exactly once.
    """

    def __init__(self, racks: Sequence[Sequence[int]], timeout: timedelta) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if sorted(r for rack in racks for r in rack) != list(range(world_size)) or not all(racks):
            raise ValueError(f"racks are {racks}, but must have each of the ranks 0 to {world_size - 1} exactly once")
        self.mine = next(list(rack) for rack in racks if rank in rack)
        self.me = self.mine.index(rank)
        self.rack: Any = dist.new_subgroups_by_enumeration([list(rack) for rack in racks], timeout)[0]
        # In units that the shards of all racks are whole multiples of: where any shard begins, and after the last.
        self.units = math.lcm(*map(len, racks))
        begins = sorted({i * self.units // len(rack) for rack in racks for i in range(len(rack) + 1)})
        self.across: list[tuple[int, int, Any]] = []  # begin and end of what this rank shares with whom
        for begin, end in pairwise(begins) if len(racks) > 1 else ():
            holders = [rack[begin * len(rack) // self.units] for rack in racks]
            group = dist.new_group(holders, timeout)  # all ranks make all groups, in the same order
            if rank in holders:
                self.across.append((begin, end, group))
        # Collectives of several buckets must run in the same order on all ranks, or gloo pairs unlike ones: one thread
        # takes bucket after bucket, in the order in which DDP hands them out. A number of threads is each thread's own.
        self._worker = ThreadPoolExecutor(1, "hierarchical", torch.set_num_threads, (torch.get_num_threads(),))

    def hook(self, state: object, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """What `DistributedDataParallel.register_comm_hook` takes, with any state; backward goes on meanwhile."""
        future: Future[Tensor] = Future()
        self._worker.submit(self._answer, future, bucket.buffer())
        return future

    def _answer(self, future: Future[Tensor], gradients: Tensor) -> None:
        try:
            self.mean_(gradients)
        except Exception as error:
            future.set_exception(error)  # type: ignore[arg-type]
        else:
            future.set_result(gradients)

    @torch.no_grad()
    def mean_(self, flat: Tensor) -> None:
        """The mean over all ranks in the place of a flat tensor's own values. Collective."""
        unit = -(-len(flat) // self.units)
        padded = flat.new_zeros(self.units * unit)
        torch.div(flat, dist.get_world_size(), out=padded[: len(flat)])
        shards = padded.view(len(self.mine), -1)
        self._reduce_along_ring(shards)
        for begin, end, group in self.across:
            dist.all_reduce(padded[begin * unit : end * unit], group=group)
        if len(self.mine) > 1:
            dist.all_gather(list(shards), shards[self.me].clone(), group=self.rack)
        flat.copy_(padded[: len(flat)])

    def _reduce_along_ring(self, shards: Tensor) -> None:
        """Member i gets the rack's sum of shard i; the other shards are of no use afterwards.

        (gloo's own reduce_scatter is a whole all-reduce, and with its all_to_all all send to one at the same time.)
        """
        size = len(self.mine)
        following, previous = self.mine[(self.me + 1) % size], self.mine[self.me - 1]
        received = torch.empty_like(shards[0])
        for i in range(1, size):
            sent = dist.isend(shards[(self.me - i) % size], following, group=self.rack)
            dist.recv(received, previous, group=self.rack)
            shards[(self.me - i - 1) % size] += received
            assert sent is not None
            sent.wait()
