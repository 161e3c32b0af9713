"""N hosts on one machine: `python -m benchmarks.cluster --hosts 4 --rate 100 -- python train.py`.

Each host is a network namespace; a veth pair joins it to the switch (a bridge) of its rack, and a trunk joins two
racks, or each of more to a core switch. `tc` shapes links in both directions. The machine's own namespace is left
alone: the switches have their own.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

PREFIX = "dsnet"
PORT = 29500  # the same for all clusters: their namespaces keep them apart
# A burst below the size of a GSO packet would split packets and burn the processor.
SHAPING = "tbf rate {rate:.0f}kbit burst 40kb latency 50ms"
GSO_MAX_SIZE = 32768
CONTENTION_PERIOD = 1.0  # seconds between changes of the links' speeds
SLOWEST_SHARE = 0.25  # of a contended link's rate
MAX_HOSTS = 64


@dataclass(frozen=True)
class Setting:
    """What is special about a cluster's links.

    Attributes:
        summary: One line for people.
        racks: How many; a trunk joins two directly, and each of more to a core switch.
        oversubscription: What the hosts of a rack send together, over what its trunk carries; None: not shaped.
        interleaved: Ranks alternate between the racks; otherwise the first are in the first rack.
        slow: Share of the rate that stragglers' links have.
        stragglers: How many: the last host of the last rack, the last of the rack before it, and so on.
        contended: Whether links change their speed while they are used.
        delay: Milliseconds that a host's link adds in each direction.
        shaped: False: no hosts at all, all ranks on the loopback interface of one namespace.
    """

    summary: str
    racks: int = 2
    oversubscription: float | None = None
    interleaved: bool = False
    slow: float = 1.0
    stragglers: int = 1
    contended: bool = False
    delay: float = 0.0
    shaped: bool = True


SETTINGS = {
    "homogeneous": Setting("all links alike"),
    "oversubscribed": Setting("trunk 4:1, ranks ordered by rack", oversubscription=4),
    "oversubscribed-interleaved": Setting(
        "trunk 4:1, ranks alternate between racks", oversubscription=4, interleaved=True
    ),
    "four-racks": Setting("four racks, trunks 10:1, ranks ordered by rack", racks=4, oversubscription=10),
    "straggler": Setting("the last host's link at a quarter of the rate", slow=0.25),
    "stragglers": Setting("one host's link in each rack at a quarter of the rate", slow=0.25, stragglers=2),
    "contended": Setting("every link's rate walks randomly between a quarter and the whole", contended=True),
    "high-latency": Setting("10 ms more in each direction", delay=10),
    "loopback": Setting("no shaping: all ranks on one loopback interface", shaped=False),
}


class ClusterError(RuntimeError):
    """The machine cannot emulate the cluster."""


class RankError(RuntimeError):
    """A rank raised an exception or died."""


class Failure(NamedTuple):
    """What a rank sends in the place of its result."""

    trace: str


def check_machine(setting: Setting | None = None) -> None:
    """Raises :class:`ClusterError` that says what is missing and what to do.

    Args:
        setting: One that will be used: whether the kernel can emulate it.
    """
    if not sys.platform.startswith("linux"):
        raise ClusterError(
            f"The emulated cluster needs Linux's network namespaces, but this is {sys.platform}."
            " HINT: use a Linux machine, virtual or not."
        )
    if os.geteuid() != 0:
        raise ClusterError(
            f"The emulated cluster needs root to make network namespaces, but the user id is {os.geteuid()}."
            " HINT: use sudo, or a privileged container."
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ClusterError(
            f"The emulated cluster needs the commands ip and tc, but there is no {' and no '.join(missing)} in PATH."
            " HINT: install iproute2, for instance with `apt-get install iproute2`."
        )
    if setting is not None and setting.delay and not _kernel_has_netem():
        raise ClusterError(
            f"A delay of {setting.delay:g} ms needs the kernel's netem, which this kernel lacks."
            " HINT: `modprobe sch_netem`, or a kernel built with CONFIG_NET_SCH_NETEM; leave the setting out here."
        )


def _kernel_has_netem() -> bool:
    name = f"{PREFIX}-{os.getpid()}-netem-probe"
    _command("ip", "netns", "add", name)
    try:
        _command("tc", "-n", name, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except ClusterError:
        return False
    finally:
        _delete([name])
    return True


def random_walk(seed: int, hosts: int) -> Iterator[list[float]]:
    """Shares of the rate that the hosts' links have, one list per :data:`CONTENTION_PERIOD`; the same for a seed."""
    generator = random.Random(seed)
    shares = [generator.uniform(SLOWEST_SHARE, 1) for _ in range(hosts)]
    while True:
        yield shares
        shares = [min(1.0, max(SLOWEST_SHARE, share * 2 ** generator.uniform(-0.7, 0.7))) for share in shares]


class Cluster:
    """Hosts that exist inside a ``with`` block, joined as a setting says.

    Whatever ends the block (an exception, Ctrl-C), its namespaces and every process in them are gone afterwards. What
    a killed owner left behind is removed when the next cluster starts.

    Args:
        hosts: Number of hosts, one rank each.
        rate: Of a host's link, in Mbit/s, each direction.
        setting: What is special about the links.
        trunk: Rate of each link between racks, in Mbit/s, in the place of the setting's.
    """

    _numbers = itertools.count()

    def __init__(self, hosts: int, rate: float, setting: Setting, trunk: float | None = None) -> None:
        least = max(2, setting.racks)
        if not least <= hosts <= MAX_HOSTS:
            raise ValueError(f"hosts is {hosts}, but a cluster of {setting.racks} racks has {least} to {MAX_HOSTS}")
        for name, value in {"rate": rate, "trunk": trunk}.items():
            if value is not None and not 0.1 <= value <= 100_000:
                raise ValueError(f"{name} is {value}, but must be 0.1 to 100,000 Mbit/s")
        self.hosts, self.rate, self.setting = hosts, rate, setting
        self.interface = "eth0" if setting.shaped else "lo"
        last_first = [reversed(ranks) for ranks in reversed(self._ranks_by_rack())]
        order = [rank for row in itertools.zip_longest(*last_first) for rank in row if rank is not None]
        slow = order[: setting.stragglers]
        self.rates = [rate * setting.slow if rank in slow else rate for rank in range(hosts)]
        self.trunk = trunk
        if trunk is None and setting.oversubscription is not None:
            self.trunk = hosts / setting.racks * rate / setting.oversubscription
        self.name = f"{PREFIX}-{os.getpid()}-{next(self._numbers)}"
        self.racks = [f"{self.name}-rack{i}" for i in range(setting.racks)] if setting.shaped else []
        own = [f"{self.name}-host{rank}" for rank in range(hosts)]
        self.namespaces = own if setting.shaped else [f"{self.name}-all"] * hosts  # of each rank

    def rack_of(self, rank: int) -> int:
        """The rack that a rank's host stands in."""
        racks = self.setting.racks
        return rank % racks if self.setting.interleaved else racks * rank // self.hosts

    def _ranks_by_rack(self) -> list[list[int]]:
        racks = range(self.setting.racks)
        return [[rank for rank in range(self.hosts) if self.rack_of(rank) == rack] for rack in racks]

    def description(self) -> str:
        """The cluster for a planner, as YAML: bandwidths in Gbit/s, the latency that a host's link adds in ms.

        Racks are below one core, also where a trunk joins two directly, and a trunk that is not shaped carries what
        its rack's hosts can send.
        """
        if not self.setting.shaped:
            raise ValueError("ranks on the loopback interface have no links to describe")
        switches, hosts = ["  core: {}"], []
        for rack, ranks in enumerate(self._ranks_by_rack()):
            trunk = sum(self.rates[rank] for rank in ranks) if self.trunk is None else self.trunk
            switches.append(f"  rack{rack}: {{to: core, bandwidth: {trunk / 1000:g}}}")
        for rank, rate in enumerate(self.rates):
            link = f"to: rack{self.rack_of(rank)}, bandwidth: {rate / 1000:g}, latency: {self.setting.delay:g}"
            hosts.append(f"  host{rank}: {{{link}, ranks: [{rank}]}}")
        return "\n".join(["switches:", *switches, "hosts:", *hosts, ""])

    # ---- up and down ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        check_machine(self.setting)
        remove_stale()
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._down()

    def _up(self) -> None:
        switches = [*self.racks, f"{self.name}-core"] if len(self.racks) > 2 else self.racks
        names = [*switches, *dict.fromkeys(self.namespaces)]
        _batch(["ip"], [f"netns add {name}" for name in names])
        for name in names:
            _command("ip", "-n", name, "link", "set", "lo", "up")
        if not self.setting.shaped:
            return
        for switch in switches:
            _batch(["ip", "-n", switch], ["link add switch type bridge", "link set switch up"])
        for rank, host in enumerate(self.namespaces):
            rack = self.racks[self.rack_of(rank)]
            _command(*f"ip link add eth0 netns {host} type veth peer name port{rank} netns {rack}".split())
            _batch(["ip", "-n", rack], _plug(f"port{rank}"))
            _batch(
                ["ip", "-n", host],
                [
                    *_link("eth0"),
                    f"addr add {self.address(rank)}/24 dev eth0",
                    # The system's setting of it cannot be changed in a namespace.
                    f"route change 10.0.0.0/24 dev eth0 src {self.address(rank)} congctl cubic",
                ],
            )
        *below, core = switches  # of two racks the second is the first one's core
        for i, rack in enumerate(below):
            port = f"trunk{i or ''}"
            _command(*f"ip link add trunk netns {rack} type veth peer name {port} netns {core}".split())
            for switch, device in ((rack, "trunk"), (core, port)):
                _batch(["ip", "-n", switch], _plug(device))
                if self.trunk is not None:
                    _batch(["tc", "-n", switch], [self._shape(device, self.trunk)])
        self._shape_hosts(self.rates)
        if self.setting.delay:
            for host, rack, port in self._cables():
                for namespace, device in ((host, "eth0"), (rack, port)):
                    delay = f"netem delay {self.setting.delay:g}ms limit 10000"
                    _batch(["tc", "-n", namespace], [f"qdisc add dev {device} parent 1:1 handle 2: {delay}"])

    def _down(self) -> None:
        with _signals_ignored():
            _delete([name for name in _namespaces() if name.startswith(f"{self.name}-")])

    def _cables(self) -> Iterator[tuple[str, str, str]]:
        for rank, host in enumerate(self.namespaces):
            yield host, self.racks[self.rack_of(rank)], f"port{rank}"

    @staticmethod
    def _shape(device: str, rate: float) -> str:
        return f"qdisc replace dev {device} root handle 1: {SHAPING.format(rate=1000 * rate)}"

    def _shape_hosts(self, rates: Sequence[float]) -> None:
        ports: dict[str, list[str]] = {rack: [] for rack in self.racks}
        for (host, rack, port), rate in zip(self._cables(), rates, strict=True):
            _batch(["tc", "-n", host], [self._shape("eth0", rate)])
            ports[rack].append(self._shape(port, rate))
        for rack, lines in ports.items():
            _batch(["tc", "-n", rack], lines)

    @contextmanager
    def _contention(self, seed: int) -> Iterator[None]:
        """The walk of a contended cluster's links; it begins anew, so that whatever runs next meets the same speeds."""
        if not self.setting.contended:
            yield
            return
        over = threading.Event()

        def walk() -> None:
            for shares in random_walk(seed, self.hosts):
                self._shape_hosts([rate * share for rate, share in zip(self.rates, shares, strict=True)])
                if over.wait(CONTENTION_PERIOD):
                    return

        thread = threading.Thread(target=walk, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    # ---- faults -----------------------------------------------------------------------------------------------------

    def cut(self, rank: int) -> None:
        """Pulls the cable of a rank's host: what is sent is lost, and no connection is told."""
        self._plug_port(rank, "down")

    def mend(self, rank: int) -> None:
        """Plugs the cable in again. A connection goes on when its sender next tries again."""
        self._plug_port(rank, "up")

    def slow(self, rank: int, share: float) -> None:
        """Gives a rank's link this share of its rate, in both directions, also while it is used; 1 is all of it."""
        host, rack, port = self._cable(rank)
        for namespace, device in ((host, "eth0"), (rack, port)):
            _batch(["tc", "-n", namespace], [self._shape(device, self.rates[rank] * share)])

    def _plug_port(self, rank: int, state: str) -> None:
        # The switch's side: the host's own would lose its routes with the link.
        _, rack, port = self._cable(rank)
        _command("ip", "-n", rack, "link", "set", port, state)

    def _cable(self, rank: int) -> tuple[str, str, str]:
        if not self.setting.shaped:
            raise ValueError("ranks on the loopback interface have no links of their own")
        return list(self._cables())[rank]

    # ---- what runs on it --------------------------------------------------------------------------------------------

    def address(self, rank: int) -> str:
        """A rank's IP address."""
        return f"10.0.0.{rank + 1}" if self.setting.shaped else "127.0.0.1"

    def environment(self, rank: int) -> dict[str, str]:
        """What tells torch and Lightning (`devices=1, num_nodes=hosts`) who they are, as torchrun would."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.hosts),
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(rank),
            "NODE_RANK": str(rank),
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": self.interface,
            "TORCHELASTIC_RUN_ID": self.name,
        }

    def bytes_sent(self) -> list[int]:
        """What each rank's interface has sent since it came up, by its own counter, headers and all.

        On the loopback, where one interface serves all ranks, an equal share of it each.
        """
        counts = []
        for namespace in self.namespaces:
            shown = json.loads(_command("ip", "-n", namespace, "-s", "-j", "link", "show", self.interface))
            counts.append(int(shown[0]["stats64"]["tx"]["bytes"]))
        return counts if self.setting.shaped else [count // self.hosts for count in counts]

    def call(self, fn: Callable[..., Any], *args: Any, timeout: float, seed: int = 0) -> list[Any]:
        """``fn(rank, *args)`` on every host, each in a fork of this process; the results in the order of ranks.

        Args:
            fn: What to run; its result must be picklable.
            *args: Further arguments.
            timeout: Seconds until all are killed.
            seed: Of the walk of a contended cluster's links.

        Raises:
            TimeoutError: Naming the ranks that had not finished.
            RankError: With the traceback of the first rank that failed.
        """
        context = multiprocessing.get_context("fork")
        processes, pipes = [], []
        results: dict[int, Any] = {}
        try:
            for rank in range(self.hosts):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=self._host_main, args=(rank, sender, fn, args))
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            with self._contention(seed):
                for rank, result in _receive(pipes, timeout, fn.__name__):
                    if isinstance(result, Failure):
                        raise RankError(f"rank {rank} failed in {fn.__name__}:\n{result.trace}")
                    results[rank] = result
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [results[rank] for rank in range(self.hosts)]

    def _host_main(self, rank: int, pipe: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        result: Any
        try:
            _enter(self.namespaces[rank])
            os.environ.update(self.environment(rank))
            result = fn(rank, *args)
        except BaseException:
            result = Failure(traceback.format_exc())
        pipe.send_bytes(pickle.dumps(result))
        os._exit(0)  # what the parent does at its exit is not this process's to do

    def run(self, command: Sequence[str], timeout: float, seed: int = 0) -> int:
        """Runs a command on every host, each line that it prints preceded by its rank.

        Args:
            command: Program and arguments.
            timeout: Seconds until all are killed.
            seed: Of the walk of a contended cluster's links.

        Returns:
            0, or the exit code of the first rank that failed (the others are killed), or 124 after the timeout.
        """
        processes: list[subprocess.Popen[str]] = []
        readers = []
        deadline = time.monotonic() + timeout
        try:
            for rank, namespace in enumerate(self.namespaces):
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment(rank)},
                    preexec_fn=partial(_enter, namespace),
                )
                processes.append(process)
                readers.append(threading.Thread(target=_echo, args=(rank, process), daemon=True))
                readers[-1].start()
            with self._contention(seed):
                while True:
                    codes = [process.poll() for process in processes]
                    failed = [rank for rank, code in enumerate(codes) if code]
                    if failed:
                        code = codes[failed[0]] or 0
                        print(f"rank {failed[0]} ended with {code}; the others are killed", file=sys.stderr)
                        return 128 - code if code < 0 else code
                    late = [rank for rank, code in enumerate(codes) if code is None]
                    if not late:
                        return 0
                    if time.monotonic() > deadline:
                        print(f"ranks {late} did not finish within {timeout:g} s", file=sys.stderr)
                        return 124
                    time.sleep(0.05)
        finally:
            with _signals_ignored():
                for process in processes:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                for reader in readers:
                    reader.join(1)


def _receive(pipes: list[Connection], timeout: float, what: str) -> Iterator[tuple[int, Any]]:
    """The ranks' results as they come."""
    deadline = time.monotonic() + timeout
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(
                f"ranks {sorted(waiting.values())} did not finish {what} within {timeout:g} s."
                " HINT: a longer --timeout, fewer steps, or a faster link."
            )
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                yield rank, pickle.loads(pipe.recv_bytes())
            except EOFError:
                yield rank, Failure("the process died without a word: killed, perhaps for lack of memory\n")


def _echo(rank: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{rank}] {line}", end="", flush=True)


def _enter(namespace: str) -> None:
    """Moves this process into a namespace and a session of its own, and gives it the host's name.

    (os.setns and os.unshare are there from Python 3.12 on only.)
    """
    if os.getpid() != os.getsid(0):
        os.setsid()  # Ctrl-C is for the owner, who then ends all
    libc = ctypes.CDLL(None, use_errno=True)
    with (Path("/run/netns") / namespace).open() as file:
        new_network = 0x40000000
        if libc.setns(file.fileno(), new_network):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
    host = namespace.rpartition("-")[2]
    if host.startswith("host"):  # ranks on the loopback share the machine's name
        new_host_name = 0x04000000
        if libc.unshare(new_host_name):
            raise OSError(ctypes.get_errno(), f"cannot give {namespace} a host name")
        socket.sethostname(host)
    death_signal = 1
    libc.prctl(death_signal, signal.SIGKILL)  # also where the owner gets no chance to clean up


def sent_by(interface: str) -> int:
    """Bytes that an interface of this process's own namespace has sent."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            return int(counts.split()[8])
    raise ValueError(f"there is no interface {interface!r} here")


def _link(device: str) -> list[str]:
    """Without IPv6, whose own chatter would be counted."""
    return [f"link set {device} addrgenmode none", f"link set {device} gso_max_size {GSO_MAX_SIZE} up"]


def _plug(device: str) -> list[str]:
    return [*_link(device), f"link set {device} master switch"]


def _command(*command: str, stdin: str | None = None) -> str:
    # In a session of its own: Ctrl-C must not interrupt the cleaning up.
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise ClusterError(
            f"`{' '.join(command)}` failed: {done.stderr.strip()}\n{stdin or ''}"
            "HINT: network namespaces and tc need root with CAP_NET_ADMIN and CAP_SYS_ADMIN; a container needs"
            " --privileged."
        )
    return done.stdout


def _batch(command: list[str], lines: list[str]) -> None:
    _command(*command, "-batch", "-", stdin="\n".join(lines) + "\n")


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _command("ip", "netns", "list").splitlines() if line.startswith(f"{PREFIX}-")]


def _delete(names: list[str]) -> None:
    for name in names:
        for pid in _command("ip", "netns", "pids", name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _command("ip", "netns", "delete", name)


def remove_stale() -> None:
    """Removes namespaces whose owner is dead, and what still runs in them."""
    for name in _namespaces():
        owner = re.match(rf"{PREFIX}-(\d+)-", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            with suppress(ClusterError):  # another cluster's start was faster
                _delete([name])


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """No second Ctrl-C interrupts the cleaning up (only the main thread gets signals, and only it may set handlers)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def exit_on_sigterm() -> None:
    """SIGTERM unwinds the stack, as Ctrl-C does, so that ``with`` blocks clean up."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs a command on every host of a cluster."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cluster",
        usage="%(prog)s [options] -- command ...",
        description="Runs a command on every host of an emulated cluster, with RANK, WORLD_SIZE, MASTER_ADDR and so on"
        " set as torchrun would. For Lightning: devices=1, num_nodes=HOSTS.",
        epilog="settings: " + "; ".join(f"{name}: {setting.summary}" for name, setting in SETTINGS.items()),
    )
    parser.add_argument("--hosts", type=int, default=4, help="number of hosts (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=100, help="of a host's link, in Mbit/s (default: %(default)s)")
    parser.add_argument(
        "--trunk", type=float, help="rate of each link between racks, in Mbit/s (default: the setting's)"
    )
    parser.add_argument("--setting", choices=SETTINGS, default="homogeneous", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of contended links (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("command", nargs="+", help="the program and its arguments")
    args = parser.parse_args(argv)
    if not args.timeout > 0:
        parser.error(f"--timeout is {args.timeout}, but must be positive")
    exit_on_sigterm()
    try:
        with Cluster(args.hosts, args.rate, SETTINGS[args.setting], args.trunk) as cluster:
            return cluster.run(args.command, args.timeout, args.seed)
    except (ValueError, ClusterError) as error:
        parser.error(str(error))
    except FileNotFoundError as error:
        parser.error(f"cannot run {args.command[0]!r}: {error}")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
