"""One host's part in measuring a network: it sends to others and counts what comes, when it is told to."""

from __future__ import annotations

import itertools
import math
import os
import selectors
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# Of a window's time nothing is counted: connections speed up, and token buckets are full.
SETTLING = 0.3
_CHUNK = 2**18
_PINGS = 3
_CONNECTING = 5.0  # seconds, at most
_HEADER = struct.Struct("!16sII")  # token of this probe, round, number of the host that sends
_MAX_PACING_RATE = 47  # of Linux, bytes per second
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: what is in the buffers is not to hold up the next round


class Station:
    """Sockets of one host, and what is done with them. `close` it in the end.

    Args:
        number: Of this host.
        left: Seconds until all must be over.
    """

    def __init__(self, number: int, left: Callable[[], float]) -> None:
        self.number, self.sent = number, 0
        self._left = left
        self._token = b""
        self._addresses: list[tuple[str, int]] = []
        self._listener: socket.socket | None = None
        self._incoming: dict[int, list[tuple[int, socket.socket]]] = defaultdict(list)  # of each round, with the sender
        self._outgoing: list[tuple[int, socket.socket]] = []

    def obey(self, word: dict[str, Any]) -> dict[str, Any]:
        """Do what rank 0 says; an error is an answer as well."""
        try:
            actions: dict[str, Callable[..., dict[str, Any]]] = {
                "listen": self._listen,
                "meet": self._meet,
                "connect": self._connect,
                "run": self._run,
            }
            return actions[word["do"]](**{name: value for name, value in word.items() if name != "do"})
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)}

    def close(self) -> None:
        """Close everything, also what others have just connected."""
        self._deafen()
        self._hang_up()

    def _deafen(self) -> None:
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._listener.close()

    def _hang_up(self, before: float = math.inf) -> None:
        """Close what rounds before this one have left; others may be connecting for it already."""
        left = [self._incoming.pop(round) for round in [*self._incoming] if round < before]
        for _, connection in [*self._outgoing, *itertools.chain(*left)]:
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            connection.close()
        self._outgoing.clear()

    # ---- what rank 0 says -------------------------------------------------------------------------------------------

    def _listen(self, token: str, towards: str = "") -> dict[str, Any]:
        self._token = token.encode()
        family, address = own_address(towards)
        self._deafen()
        self._listener = socket.create_server((address, 0), family=family, backlog=512)
        threading.Thread(target=self._accept, args=(self._listener,), name="dssync: probe", daemon=True).start()
        return {"address": self._listener.getsockname()[:2]}

    def _meet(self, addresses: list[tuple[str, int]]) -> dict[str, Any]:
        self._addresses = addresses
        return {}

    def _connect(self, flows: list[tuple[int, int, int, float]], round: int) -> dict[str, Any]:
        """Connect to whom this host is to send to. Gives the seconds that a byte takes to each."""
        self._hang_up(round)
        latencies = []
        for source, target, connections, pace in flows:
            if source != self.number:
                continue
            address = (self._addresses[target][0], self._addresses[target][1])
            took = []
            for _ in range(connections):
                try:
                    connection = socket.create_connection(address, min(_CONNECTING, self._left()))
                    self._outgoing.append((target, connection))
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    with suppress(OSError):  # the kernel may not know it
                        connection.setsockopt(socket.SOL_SOCKET, _MAX_PACING_RATE, struct.pack("Q", int(pace)))
                    connection.sendall(_HEADER.pack(self._token, round, self.number))
                    for _ in range(_PINGS):
                        start = time.perf_counter()
                        connection.sendall(b".")
                        _receive(connection, 1)
                        took.append(time.perf_counter() - start)
                except OSError as error:
                    raise OSError(f"cannot connect to {address[0]}:{address[1]}: {error}") from None
                connection.setblocking(False)
            latencies.append((source, target, min(took) / 2))
        return {"latencies": latencies}

    def _run(self, seconds: float, most: int, round: int) -> dict[str, Any]:
        """Send to all that are connected, at most so many bytes to each, and count what comes."""
        start = time.monotonic()
        sender = threading.Thread(target=self._send, args=(start + seconds, most), name="dssync: probe", daemon=True)
        sender.start()
        rates = self._count(self._incoming.get(round, []), start, start + seconds)
        sender.join()
        return {"rates": [(source, self.number, rate) for source, rate in rates.items()], "sent": self.sent}

    # ---- connections ------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                connection.settimeout(2)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                token, round, source = _HEADER.unpack(_receive(connection, _HEADER.size))
                if token != self._token:
                    raise OSError("this is somebody else")
                for ping in range(_PINGS):
                    _receive(connection, 1)
                    if ping == _PINGS - 1:  # with its answer the sender is ready
                        connection.setblocking(False)
                        self._incoming[round].append((source, connection))
                    connection.send(b".")
            except OSError:
                connection.close()

    # ---- a window ---------------------------------------------------------------------------------------------------

    def _send(self, end: float, most: int) -> None:
        left: dict[int, int] = {target: most for target, _ in self._outgoing}
        chunk = memoryview(bytes(_CHUNK))
        with selectors.DefaultSelector() as selector:
            for target, outgoing in self._outgoing:
                selector.register(outgoing, selectors.EVENT_WRITE, target)
            while selector.get_map() and (pause := end - time.monotonic()) > 0:
                for key, _ in selector.select(pause):
                    connection: Any = key.fileobj
                    try:
                        count = connection.send(chunk[: left[key.data]]) if left[key.data] else 0
                    except BlockingIOError:
                        continue
                    except OSError:  # the receiver's window is over
                        selector.unregister(connection)
                        continue
                    left[key.data] -= count
                    self.sent += count
                    if not left[key.data]:
                        selector.unregister(connection)
                        with suppress(OSError):
                            connection.shutdown(socket.SHUT_WR)
            late = [key.fileobj for key in selector.get_map().values()]
        for connection in late:
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                connection.close()

    def _count(self, incoming: list[tuple[int, socket.socket]], start: float, end: float) -> dict[int, float]:
        """Bytes per second that came from each host."""
        came: dict[int, list[tuple[float, int]]] = {source: [] for source, _ in incoming}
        buffer = bytearray(_CHUNK)
        ended: dict[int, float] = {}
        with selectors.DefaultSelector() as selector:
            for source, arriving in incoming:
                selector.register(arriving, selectors.EVENT_READ, source)
            while selector.get_map() and (pause := end - time.monotonic()) > 0:
                for key, _ in selector.select(pause):
                    connection: Any = key.fileobj
                    try:
                        count = connection.recv_into(buffer)
                    except BlockingIOError:
                        continue
                    except OSError:
                        count = 0
                    if count:
                        came[key.data].append((time.monotonic(), count))
                    else:
                        selector.unregister(connection)
                        ended[key.data] = time.monotonic()
            for key in selector.get_map().values():
                ended[key.data] = end
        return {source: _rate(arrivals, start, ended[source], end) for source, arrivals in came.items()}


def _rate(arrivals: list[tuple[float, int]], start: float, ended: float, end: float) -> float:
    """Bytes per second once a flow has settled."""
    if not arrivals:
        return 0.0
    if ended < start + 0.9 * (end - start):  # all was sent before the window ended; how long before is not known
        start, ended = arrivals[0][0], arrivals[-1][0]
    settled = start + SETTLING * (ended - start)
    counted = sum(count for moment, count in arrivals if settled < moment <= ended)
    return counted / max(ended - settled, 1e-6)


def _receive(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise OSError("the connection was closed")
        data += more
    return data


def own_address(towards: str = "") -> tuple[socket.AddressFamily, str]:
    """The address of this host for others: of GLOO_SOCKET_IFNAME, or by which it reaches one of them."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            try:
                answer = fcntl.ioctl(
                    asking.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15])
                )  # SIOCGIFADDR
            except OSError as error:
                raise OSError(f"no IPv4 address of GLOO_SOCKET_IFNAME={interface}: {error}") from None
            return socket.AF_INET, socket.inet_ntoa(answer[20:24])
    main = towards or os.environ.get("MASTER_ADDR", "localhost")
    family, kind, _, _, where = socket.getaddrinfo(main, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as asking:
        asking.connect(where)  # sends nothing
        return family, asking.getsockname()[0]
