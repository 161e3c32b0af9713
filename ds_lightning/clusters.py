"""WHERE ranks might be: made-up clusters of equal racks, with trunks that are too small and hosts that are slow."""

from __future__ import annotations

import numpy as np

from ds_lightning.schedule import positive_int
from ds_lightning.topology import Link, Topology, amount

MOST_RANKS = 1_000_000


def generate(
    ranks: int,
    hosts_per_rack: int = 32,
    ranks_per_host: int = 8,
    bandwidth: float = 25.0,
    oversubscription: float = 4.0,
    latency: float = 0.0,
    stragglers: float = 0.0,
    straggler_share: float = 0.25,
    seed: int = 0,
) -> Topology:
    """A cluster of equal racks on one switch; what is left over of ranks and hosts makes smaller ones.

    Args:
        ranks: Number of ranks N, dealt out in order.
        hosts_per_rack: Hosts on a rack's switch. If one rack has them all, there is no trunk.
        ranks_per_host: Ranks that share a host's link.
        bandwidth: Gbit/s of a host's link.
        oversubscription: How many times the links of a rack's hosts, added up, exceed its trunk.
        latency: Milliseconds one way of each link.
        stragglers: Share of hosts that have less bandwidth; one host at least, if it is not 0.
        straggler_share: What they have of it; trunks are as large as without.
        seed: Of which hosts these are.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, number in (("ranks", ranks), ("hosts_per_rack", hosts_per_rack), ("ranks_per_host", ranks_per_host)):
        positive_int(name, number)
    if ranks > MOST_RANKS:
        raise ValueError(f"ranks={ranks} is too large. HINT: use at most {MOST_RANKS:,}.")
    for name, value in (("bandwidth", bandwidth), ("oversubscription", oversubscription)):
        amount(name, value)
    check_share("stragglers", stragglers)
    if check_share("straggler_share", straggler_share) == 0:
        raise ValueError("straggler_share=0 leaves a straggler no bandwidth. HINT: use a share above 0.")
    check_seed(seed)
    hosts = -(-ranks // ranks_per_host)
    slow = min(hosts, max(1, round(stragglers * hosts))) if stragglers else 0
    slowed = set(np.random.default_rng((seed, 0)).choice(hosts, slow, replace=False).tolist())
    fast, tardy = (Link(speed, speed, latency) for speed in (bandwidth, bandwidth * straggler_share))
    racks = -(-hosts // hosts_per_rack)
    above, links, of_host = {}, {}, {}
    for host in range(hosts):
        name = f"n{host}"
        above[name] = f"rack{host // hosts_per_rack}" if racks > 1 else "core"
        links[name] = tardy if host in slowed else fast
        of_host[name] = tuple(range(host * ranks_per_host, min((host + 1) * ranks_per_host, ranks)))
    for rack in range(racks if racks > 1 else 0):
        trunk = bandwidth * min(hosts_per_rack, hosts - rack * hosts_per_rack) / oversubscription
        above[f"rack{rack}"] = "core"
        links[f"rack{rack}"] = Link(trunk, trunk, latency)
    return Topology(above, links, of_host)


def check_share(name: str, value: float) -> float:
    """``value``, or a ``ValueError`` naming it unless it is from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value:g} is no share. HINT: use a number from 0 to 1.")
    return value


def check_seed(seed: int) -> int:
    """``seed``, or a ``ValueError`` if it is negative, which numpy does not take."""
    if seed < 0:
        raise ValueError(f"seed={seed} is negative. HINT: use 0 or more.")
    return seed
