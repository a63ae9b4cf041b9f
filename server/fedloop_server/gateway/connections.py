"""Which connections are held, from the moment each is accepted: bounds by address and in whole. Idle ones give way."""

from __future__ import annotations

import ipaddress
import resource
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Final

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_FILES_EACH: Final = 2
"""Of a connection: itself, and the file into which its request's body goes."""
_OTHER_FILES: Final = 256
"""Of the process: its log, its blob store, what Python holds open, and connections that are about to end."""


class Connection:
    """One that was accepted. It is idle while no request is under way: before the TLS handshake has ended, too."""

    __slots__ = ("_book", "address", "close")

    def __init__(self, book: Connections, address: str, close: Callable[[], object]) -> None:
        self._book, self.address = book, address
        self.close = close
        """Ends it at once, whatever it is at."""

    def busy(self) -> None:
        """A request is under way: from here on it gives way to nobody."""
        self._book.busy(self)

    def idle(self) -> None:
        self._book.idle(self)

    def gone(self) -> None:
        self._book.gone(self)


class Connections:
    """The book of them. Of the network `total` are held, of one address `each`; of one of the `proxies` as many as of all.

    A new one beyond a bound takes the place of the one that has been idle for longest, of the same address if that has reached
    its own bound, otherwise of the address that holds most. Where none is idle, the new one is refused.
    """

    def __init__(self, total: int, each: int, proxies: Collection[Network] = ()) -> None:
        self.total, self._each, self._proxies = total, each, proxies
        self._held: defaultdict[str, set[Connection]] = defaultdict(set)
        self._idle: defaultdict[str, dict[Connection, None]] = defaultdict(dict)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def admit(self, host: str, close: Callable[[], object]) -> Connection | None:
        """A new one from `host`, which `close` would end; None if there is no place for it."""
        address = shared_address(host)
        if len(self._held.get(address, ())) >= self._each and not self._is_proxy(host):
            if not self._end_idle(address):
                return None
        elif self._count >= self.total and not self.make_room():
            return None
        connection = Connection(self, address, close)
        self._held[address].add(connection)
        self._idle[address][connection] = None
        self._count += 1
        return connection

    def make_room(self) -> bool:
        """End one that is idle; whether there was one. Behind a proxy are many, so it comes last."""
        if not self._idle:
            return False
        return self._end_idle(max(self._idle, key=lambda each: (not self._is_proxy(each), len(self._held[each]))))

    def busy(self, connection: Connection) -> None:
        if (idle := self._idle.get(connection.address)) is not None:
            idle.pop(connection, None)
            if not idle:
                del self._idle[connection.address]

    def idle(self, connection: Connection) -> None:
        if connection in self._held.get(connection.address, ()):
            self._idle[connection.address][connection] = None

    def gone(self, connection: Connection) -> None:
        """It has ended, or is about to."""
        self.busy(connection)
        held = self._held.get(connection.address, set())
        if connection in held:
            held.discard(connection)
            self._count -= 1
            if not held:
                del self._held[connection.address]

    def _end_idle(self, address: str) -> bool:
        oldest = next(iter(self._idle.get(address, ())), None)
        if oldest is None:
            return False
        self.gone(oldest)
        oldest.close()
        return True

    def _is_proxy(self, host: str) -> bool:
        return bool(self._proxies) and any(ipaddress.ip_address(_bare(host)) in network for network in self._proxies)


def shared_address(host: str) -> str:
    """What counts as one address: of IPv6 the network of 64 bits, in which one machine may take any."""
    try:
        address = ipaddress.ip_address(_bare(host))
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Address(int(address) >> 64 << 64))
    return str(address)


def raise_open_files(connections: int) -> int:
    """Let this process open as many files as so many connections need; for how many of them the operating system allows it."""
    needed = connections * _FILES_EACH + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, (soft - _OTHER_FILES) // _FILES_EACH))


def _bare(host: str) -> str:
    """Without the zone, and an IPv4 address that came through a socket of IPv6 as the one that it is."""
    bare = host.partition("%")[0]
    return bare.removeprefix("::ffff:") if bare.startswith("::ffff:") and "." in bare else bare
