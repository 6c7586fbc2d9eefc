"""How the ranks of a Slurm step, or of one node, find one another, without trusting names or ports.

On many clusters a node's name does not resolve where it should, and the port that everybody computes
from the job's number is taken by somebody else. So rank 0 binds a port first, writes down where it
listens in a file that all nodes see, and the others try its addresses one after the other. Every rank
then reports, so that a run that does not come together names the ranks that are missing.

The port is open only until all are there: whoever comes later is not one of the run.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from agrivision.errors import ConfigurationError, Interrupted, PeerLost
from agrivision.ownership import read_own
from agrivision.phase import moved
from agrivision.storage import write_atomically
from agrivision.world import PORTS, World

_POLL_SECONDS = 0.2  # of a folder that many nodes share
_POLL_SECONDS_HERE = 0.02
_CONNECT_SECONDS = 5.0  # a firewall that drops packets answers nothing
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR
_MARK = "mark"
_ALL_HERE = "all here"
_CLOSED = "closed"


@dataclass(frozen=True)
class Meeting:
    """The ranks of a run, met.

    Attributes:
        store: that all of them are connected to; it lives in rank 0.
        file: that said where.
        listener: descriptor of the socket at which rank 0 listens; None on the others.
    """

    store: Store
    file: Path
    listener: int | None

    def close(self) -> None:
        """Let nobody else in; call it when all connections are open, which stay."""
        if self.listener is None:
            return
        # The store's thread waits for this descriptor: something takes its place that is never ready.
        nothing = os.eventfd(0)
        try:
            os.dup2(nothing, self.listener, inheritable=False)
        finally:
            os.close(nothing)
        self.store.set(_CLOSED, "")  # it waits anew, and the kernel gives up the socket
        with suppress(OSError):
            self.file.unlink()


def meeting_file(world: World, run_dir: Path | None) -> Path | None:
    """The file where rank 0 says where it listens; None where no launcher and no folder give one."""
    if world.rendezvous_file:
        return Path(world.rendezvous_file)
    folder = Path(world.job_dir) if world.job_dir else run_dir
    if world.launcher != "slurm" or folder is None:
        return None
    return folder / f".rendezvous-{world.attempt}.json"


@contextmanager
def meeting(world: World, file: Path, device: str, stop: Callable[[], bool]) -> Iterator[Meeting]:
    """The ranks of a run, connected to a store in rank 0 while the block runs.

    Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface on which the ranks met, unless the
    user or the admin has.

    Args:
        world: of several ranks.
        file: where rank 0 says where it listens, in a folder that exists and that all nodes see.
        device: identifies this rank's GPU on its node, empty on the CPU.
        stop: whether this rank was asked to stop.

    Raises:
        PeerLost: a rank did not come; the line names it.
        ConfigurationError: ranks would share a GPU.
        Interrupted: asked to stop while waiting.
    """
    wait = _Wait(world, stop)
    descriptor = None
    if world.is_main:
        listener = _listen(world)
        port = listener.getsockname()[1]
        descriptor = listener.detach()
        store: Store = _open_store("127.0.0.1", port, descriptor)
        token = secrets.token_hex(16)
        store.set(_MARK, token)
        addresses = ["127.0.0.1"] if world.one_node else _own_addresses()
        content = json.dumps({"token": token, "port": port, "addresses": addresses})
        write_atomically(file, content.encode(), mode=0o600)  # a mask of 002 would open it
        address = ""
    else:
        store, address = _join(world, file, wait)
    try:
        _report(store, world, address, device)
        if world.is_main:
            reached = _gather(store, world, wait)
            store.set(_ALL_HERE, _fault(world, reached))
            address = next((each["address"] for each in reached if each["address"]), "127.0.0.1")
        else:
            wait.until(lambda: store.check([_ALL_HERE]), lambda: "rank 0 to see all the others")
        fault = store.get(_ALL_HERE).decode()
        if fault:
            raise ConfigurationError(fault)
        _prefer_interface(address, own=world.is_main)
        yield Meeting(store, file, descriptor)
    finally:
        if world.is_main:
            with suppress(OSError):
                file.unlink()


class _Wait:
    """Waits for conditions, up to one moment that holds for all of them."""

    def __init__(self, world: World, stop: Callable[[], bool]) -> None:
        self._poll = _POLL_SECONDS_HERE if world.one_node else _POLL_SECONDS
        self._seconds = world.rendezvous_seconds
        self._end = time.monotonic() + self._seconds
        self._stop = stop

    def until(self, condition: Callable[[], bool], what: Callable[[], str]) -> None:
        """Wait for a condition.

        Raises:
            PeerLost: it did not come true in time.
            Interrupted: asked to stop before.
        """
        while not condition():
            if self._stop():
                raise Interrupted("asked to stop before the ranks had met: nothing to save yet")
            if time.monotonic() > self._end:
                raise PeerLost(f"waited {self._seconds:.0f} s for {what()}: see the job's log for them")
            moved()  # this waiting has an end of its own
            time.sleep(self._poll)


def _listen(world: World) -> socket.socket:
    """A socket that listens on the first free port of a row that begins where the job's number says.

    On loopback only where all ranks are on one node.
    """
    host = "127.0.0.1" if world.one_node else ""
    for place in range(len(PORTS)):
        port = PORTS[(world.master_port - PORTS.start + place) % len(PORTS)]
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(world.size)
        except OSError:  # taken
            listener.close()
            continue
        return listener
    raise PeerLost(f"no free port from {PORTS.start} to {PORTS.stop - 1} on this node")


def _open_store(address: str, port: int, listener: int | None = None) -> TCPStore:
    # Only the store that does not use libuv takes over a socket that is bound already.
    return TCPStore(
        address,
        port,
        is_master=listener is not None,
        timeout=timedelta(seconds=30),
        wait_for_workers=False,
        master_listen_fd=listener,
        use_libuv=False,
    )


def _own_addresses() -> list[str]:
    """Where this node may be reached, the likeliest first; loopback last, for ranks of this node."""
    found: list[str] = []
    with suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    found += [address for address in map(_address_of, _interfaces()) if address]
    others = [address for address in dict.fromkeys(found) if not address.startswith("127.")]
    return [*others, "127.0.0.1"]


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _address_of(interface: str) -> str:
    """The IPv4 address of an interface, empty where it has none."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, request)
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _join(world: World, file: Path, wait: _Wait) -> tuple[Store, str]:
    """Connect to rank 0; returns its store and the address at which it was reached."""
    found: list[tuple[Store, str]] = []

    def try_once() -> bool:
        try:
            place: dict[str, Any] = json.loads(read_own(file))
            addresses, port, token = place["addresses"], int(place["port"]), str(place["token"])
        except (OSError, ValueError, KeyError):  # not there yet: NFS may show it half a minute late
            return False
        for address in addresses:
            store = _connect(address, port, token)
            if store is not None:
                found.append((store, address))
                return True
        return False

    wait.until(try_once, lambda: f"{world.host(0)}, which says where it listens in {file}")
    return found[0]


def _connect(address: str, port: int, token: str) -> Store | None:
    """The store at an address, if it is the one that is meant."""
    try:
        # The store's own connecting waits long for an address that does not answer.
        socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
        store = _open_store(address, port)
        return store if store.get(_MARK).decode() == token else None
    except (OSError, RuntimeError, UnicodeDecodeError):
        return None


def _report(store: Store, world: World, address: str, device: str) -> None:
    about = {"host": socket.gethostname(), "address": address, "device": device}
    store.set(f"rank {world.rank}", json.dumps(about))


def _gather(store: Store, world: World, wait: _Wait) -> list[dict[str, str]]:
    """What all ranks reported, in their order."""
    missing = set(range(world.size))

    def all_here() -> bool:
        missing.difference_update({rank for rank in missing if store.check([f"rank {rank}"])})
        return not missing

    def who() -> str:
        names = [world.host(rank) for rank in sorted(missing)]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"{len(missing)} of {world.size} ranks ({shown})"

    wait.until(all_here, who)
    return [json.loads(store.get(f"rank {rank}")) for rank in range(world.size)]


def _fault(world: World, reports: list[dict[str, str]]) -> str:
    """What is wrong with how the ranks were placed; empty where nothing is."""
    users: dict[tuple[str, str], int] = {}
    for rank, report in enumerate(reports):
        place = (report["host"], report["device"])
        if report["device"] and place in users:
            return (
                f"{world.host(users[place])} and {world.host(rank)} would share a GPU: ask for as many"
                " GPUs as ranks on a node, with --gpus-per-node"
            )
        users[place] = rank
    return ""


def _prefer_interface(address: str, *, own: bool) -> None:
    """Let gloo and NCCL use the interface on which the ranks met.

    Args:
        address: of rank 0.
        own: it is this node's address; else this node's is found by looking how it would be reached.
    """
    if not own:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((address, 9))  # sends nothing: UDP only looks up the route
            address = probe.getsockname()[0]
    for interface in _interfaces():
        if _address_of(interface) == address:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
            return
