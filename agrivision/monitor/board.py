"""TensorBoard for the one who started it, in a job on a cluster or on a machine of one's own.

It listens on loopback, behind a random word in its path that each start draws anew: on a shared node
everybody can connect to loopback. On a socket instead there is no port at all, in a folder that others
cannot enter. The word is never an argument of a program, since everybody can read those.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from agrivision.errors import BadInput
from agrivision.ownership import open_own, require_own
from agrivision.storage import detach
from agrivision.world import PORTS

_LOOPBACK = "127.0.0.1"
_HERE = {"localhost", _LOOPBACK, "[::1]"}  # what a browser calls the near end of a tunnel
_LONGEST_SOCKET = 107  # bytes that the kernel has room for
_SOCKET = "socket"
# TensorBoard's page asks for its fonts by their place on the server, without what it is served below.
# They are files of its package, and tell nothing of a run.
_FONT = re.compile(r"/font-roboto/[A-Za-z0-9_-]+\.woff2")

_App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve(runs: Path, *, port: int | None = None, socket_place: Path | None = None) -> None:
    """Serve TensorBoard over a folder of runs, and say on stdout how to reach it.

    Args:
        runs: a run directory, or a folder of them.
        port: of loopback; None takes one that is free.
        socket_place: where to make the folder of a socket, instead of a port.

    Raises:
        BadInput: there is no such folder, the port is taken, or no room for the socket's name.
    """
    if not runs.is_dir():
        raise BadInput(f"no such folder: {runs}")
    if port is not None and socket_place is not None:
        raise BadInput("a socket has no port: leave out --port or --socket")
    token = secrets.token_urlsafe(24)
    app = guarded(_tensorboard(runs.absolute(), token), token)
    with _listening(port, socket_place) as listener:
        server = _Server(listener, app)
        _keep_private(sys.stdout.fileno())
        for line in directions(listener, token):
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        server.serve_forever()


def _tensorboard(runs: Path, token: str) -> _App:
    """TensorBoard's own application, below the word.

    Not TensorBoard's `main`: that notes the word in a folder of /tmp. Nor its data server, a process
    with a port of its own that asks nobody for anything.
    """
    from tensorboard import default, program  # noqa: PLC0415 - takes seconds

    made: list[_App] = []

    class Taken(program.TensorBoardServer):  # type: ignore[misc]
        """Keeps the application for a server of our own."""

        def __init__(self, wsgi_app: _App, flags: object) -> None:  # noqa: ARG002
            made.append(wsgi_app)

        def serve_forever(self) -> None:
            """Nothing: see `serve`."""

        def get_url(self) -> str:
            return ""

    board = program.TensorBoard(default.get_plugins(), server_class=Taken)
    board.configure(
        logdir=str(runs), path_prefix=f"/{token}", load_fast="false", host=_LOOPBACK, port=0
    )
    board.launch()
    return made[0]


def guarded(app: _App, token: str) -> _App:
    """An application that answers only who knows a word, and only by the names of this machine.

    Fonts alone are everybody's. A page of somebody else's whose name is made to lead here has another
    name in its `Host`.

    Args:
        app: WSGI.
        token: first part of each path.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        host = str(environ.get("HTTP_HOST", ""))
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in _HERE:
            return _refusal("403 Forbidden", start_response)
        path = str(environ.get("PATH_INFO", ""))
        if _FONT.fullmatch(path):
            return app({**environ, "PATH_INFO": f"/{token}{path}"}, start_response)
        word = path.partition("/")[2].partition("/")[0]
        if not secrets.compare_digest(word.encode(errors="replace"), token.encode()):
            return _refusal("404 Not Found", start_response)

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            # A link that leads elsewhere must not carry the word along.
            return start_response(status, [*headers, ("Referrer-Policy", "no-referrer")], *rest)

        return app(environ, start)

    return answer


def _refusal(status: str, start_response: Callable[..., Any]) -> Iterable[bytes]:
    content = f"{status}\n".encode()
    headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(content)))]
    start_response(status, headers)
    return [content]


class _Handler(WSGIRequestHandler):
    """Without a log of requests, whose paths hold the word."""

    protocol_version = "HTTP/1.1"  # one connection for many requests

    def address_string(self) -> str:
        """Empty for who comes by a socket."""
        return str(self.client_address[0]) if self.client_address else ""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing."""

    def log(self, type: str, message: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


class _Server(ThreadedWSGIServer):
    """Serves on a socket that listens already."""

    def __init__(self, listener: socket.socket, app: _App) -> None:
        name = listener.getsockname()
        host, port = (f"unix://{name}", 0) if isinstance(name, str) else name
        super().__init__(host, port, app, _Handler, fd=listener.fileno())


@contextmanager
def _listening(port: int | None, socket_place: Path | None) -> Iterator[socket.socket]:
    """A socket on a port of loopback, or in a folder of its own, which goes with the block."""
    if socket_place is None:
        with _on_loopback(_free_ports() if port is None else [port]) as listener:
            yield listener
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="agrivision-tensorboard-", dir=socket_place.absolute()))
    except OSError as error:
        raise BadInput(f"cannot make a folder in {socket_place}: {error.strerror}") from None
    try:
        require_own(folder)
        with _in_folder(folder) as listener:
            yield listener
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _in_folder(folder: Path) -> socket.socket:
    path = str(folder / _SOCKET)
    if len(os.fsencode(path)) > _LONGEST_SOCKET:
        raise BadInput(f"{path} is too long for a socket: give --socket a folder with a shorter path")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    return listener


def _free_ports() -> Iterator[int]:
    """Where to look for a port: from where the job's id says."""
    job = os.environ.get("SLURM_JOB_ID", "")
    first = int(job) if job.isdigit() else 0
    for place in range(len(PORTS)):
        yield PORTS[(first + place) % len(PORTS)]


def _on_loopback(ports: Iterable[int]) -> socket.socket:
    """The first of some ports that is free."""
    problem: Exception | None = None
    for port in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((_LOOPBACK, port))
            listener.listen()
        except (OSError, OverflowError) as error:
            listener.close()
            problem = error
            continue
        return listener
    raise BadInput(f"no port to listen on: {problem}; without --port, a free one is taken")


def _keep_private(output: int) -> None:
    """Close a job's log to others: Slurm makes it with the mask of the shell that submitted.

    It is made anew under its name, since somebody may have opened it already.

    Args:
        output: descriptor of stdout; stderr follows where it is the same file.
    """
    status = os.fstat(output)
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o077:
        return
    path = Path(f"/proc/self/fd/{output}").readlink()
    same = os.path.samestat(status, os.fstat(sys.stderr.fileno()))
    detach(path, 0o600)
    anew = open_own(path)  # in a folder that others write, they may have been quicker
    for descriptor in (output, *([sys.stderr.fileno()] if same else [])):
        os.dup2(anew, descriptor)
    os.close(anew)


def directions(
    listener: socket.socket, token: str, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """What to type elsewhere to see the page that this node serves.

    Args:
        listener: where it does.
        token: of its path.
        environment: of this process: says whether it is in a job of Slurm, or came by ssh.
    """
    name = listener.getsockname()
    far = name if isinstance(name, str) else f"{name[0]}:{name[1]}"
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    if "SLURM_JOB_ID" in environment:
        there = ["-J", environment.get("SLURM_SUBMIT_HOST", "LOGIN_NODE"), node]
    elif "SSH_CONNECTION" in environment or isinstance(name, str):
        there = [node]
    else:
        address = f"http://localhost:{name[1]}/{token}/"
        return [f"Open {address} in a browser; keep this address to yourself. Ctrl-C ends it."]
    tunnel = ["ssh", "-N", "-L", f"6006:{far}", *there]
    return [
        "On your own machine, with your user name on the cluster before the names where it differs:",
        f"  {shlex.join(tunnel)}",
        f"and then open http://localhost:6006/{token}/ in a browser; keep this address to yourself.",
    ]
