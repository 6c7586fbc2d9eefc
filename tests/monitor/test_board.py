"""A real TensorBoard, and who can see it."""

from __future__ import annotations

import dataclasses
import http.client
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from agrivision.errors import BadInput
from agrivision.monitor import board as module
from agrivision.monitor.tensorboard import TensorBoard
from tests.others import as_root, as_stranger

_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Board:
    """A running board.

    Attributes:
        process: of it.
        log: that it prints into.
        early: the log, opened before anything stood in it.
        token: of its path.
        far: where it listens: a port, or the path of a socket.
    """

    process: subprocess.Popen[bytes]
    log: Path
    early: IO[bytes]
    token: str
    far: int | Path

    def get(self, path: str, host: str = "localhost:6006") -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of a page."""
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = self.connect()
        try:
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        """A connection to it, whatever it listens on."""
        family = socket.AF_INET if isinstance(self.far, int) else socket.AF_UNIX
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", self.far) if isinstance(self.far, int) else str(self.far))
        return connection

    def stop(self) -> int:
        """Ask it to stop; returns its exit code."""
        self.process.terminate()
        return self.process.wait(60)


def start(runs: Path, log: Path, *words: str) -> Board:
    """Start one as a job does, with a log that others may read."""
    log.touch()
    log.chmod(0o644)
    early = log.open("rb")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "agrivision", "tensorboard", str(runs), *words],
            stdout=output,
            stderr=output,
            env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_HOST": "login"},
        )
    end = time.monotonic() + _SECONDS
    while (found := re.search(r"localhost:6006/(\S+)/ ", log.read_text())) is None:
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    far = re.search(r"-L 6006:(?:127\.0\.0\.1:(\d+)|(/\S+)) -J", log.read_text())
    assert far is not None, log.read_text()
    return Board(process, log, early, found[1], int(far[1]) if far[1] else Path(far[2]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has one curve."""
    folder = tmp_path_factory.mktemp("runs")
    with TensorBoard(folder / "first" / "tensorboard", resume_step=0) as writer:
        writer.scalars(3, {"train/loss": 0.5})
    return folder


@pytest.fixture(scope="module")
def board(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """On a port."""
    found = start(runs, tmp_path_factory.mktemp("log") / "agrivision-1.out")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def hidden(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """On a socket, in a folder that others can go to the door of."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        found = start(runs, tmp_path_factory.mktemp("log") / "agrivision-2.out", "--socket", place)
        yield found
        found.stop()


def listening(process: int) -> set[tuple[str, int]]:
    """The TCP addresses, as /proc writes them, and ports on which a process listens."""
    inodes = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        name = str(entry.readlink())
        if name.startswith("socket:["):
            inodes.add(name[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                address, _, port = local.partition(":")
                found.add((address, int(port, 16)))
    return found


def children(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


@pytest.mark.parametrize("which", ["board", "hidden"])
def test_the_page_is_there_for_who_knows_the_word(which: str, request: pytest.FixtureRequest) -> None:
    board: Board = request.getfixturevalue(which)
    status, content, headers = board.get(f"/{board.token}/")
    assert status == 200 and b"<title>TensorBoard</title>" in content
    assert headers["Referrer-Policy"] == "no-referrer"
    assert board.get(f"/{board.token}/data/runs")[0] == 200


@pytest.mark.parametrize("which", ["board", "hidden"])
@pytest.mark.parametrize(
    "path",
    ["/", "", "/data/runs", "/data/environment", "/index.js", "//", "/x", "/x/data/runs", "/%2e%2e/"],
)
def test_without_the_word_there_is_nothing(
    which: str, path: str, request: pytest.FixtureRequest
) -> None:
    board: Board = request.getfixturevalue(which)
    for tried in (path, path.replace("/x", f"/{board.token[:-1]}"), f"/{board.token}x{path}"):
        status, content, _ = board.get(tried or "/")
        assert (status, content) == (404, b"404 Not Found\n"), tried


def test_fonts_are_nobody_s_secret(board: Board) -> None:
    """The page asks for them without the word; nothing else comes that way."""
    font = "/font-roboto/RxZJdnzeo3R5zSexge8UUZBw1xU1rKptJj_0jans920.woff2"
    status, content, _ = board.get(font)
    assert (status, content[:4]) == (200, b"wOF2")
    assert board.get(font, "evil.example")[0] == 403
    for path in ("/font-roboto/", "/font-roboto/../data/runs", f"/x{font}", f"{font}/data/runs"):
        assert board.get(path)[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:6006", "10.0.0.1", "", "localhost.evil"]
)
def test_a_name_that_is_not_this_machine_is_refused(board: Board, host: str) -> None:
    """A page elsewhere whose name is made to lead to the tunnel's near end."""
    assert board.get(f"/{board.token}/", host)[0] == 403
    for here in ("localhost", "127.0.0.1:7007", "[::1]:6006"):
        assert board.get(f"/{board.token}/", here)[0] == 200


def test_nothing_listens_beyond_loopback(board: Board, hidden: Board) -> None:
    assert listening(board.process.pid) == {("0100007F", board.far)}
    assert listening(hidden.process.pid) == set()
    # TensorBoard's data server would be a process with a port of its own.
    assert children(board.process.pid) == children(hidden.process.pid) == []


def test_the_word_stands_in_the_log_alone(board: Board) -> None:
    """Everybody may read what a process was started with."""
    process = Path(f"/proc/{board.process.pid}")
    for name in ("cmdline", "environ"):
        assert board.token.encode() not in (process / name).read_bytes()
    noted = Path(tempfile.gettempdir(), ".tensorboard-info", f"pid-{board.process.pid}.info")
    assert not noted.exists()


def test_the_log_is_closed_to_others_before_the_word_is_in_it(board: Board, hidden: Board) -> None:
    for each in (board, hidden):
        assert stat.S_IMODE(each.log.stat().st_mode) == 0o600
        assert each.token.encode() in each.log.read_bytes()
        assert each.token.encode() not in each.early.read()  # of whoever was quick


def test_each_start_has_a_word_of_its_own(board: Board, hidden: Board) -> None:
    assert board.token != hidden.token
    assert min(len(board.token), len(hidden.token)) >= 32


@as_root
def test_somebody_else_cannot_reach_the_socket(hidden: Board) -> None:
    assert isinstance(hidden.far, Path)
    assert stat.S_IMODE(hidden.far.parent.stat().st_mode) == 0o700
    assert as_stranger(hidden.connect) == "PermissionError"
    hidden.connect().close()
    # That is the folder's doing: in one that is open, anybody could.
    with tempfile.TemporaryDirectory(dir="/tmp") as open_folder:
        Path(open_folder).chmod(0o755)
        path = Path(open_folder, "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen()
            assert as_stranger(dataclasses.replace(hidden, far=path).connect) == ""


def test_it_leaves_nothing_behind(runs: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        found = start(runs, tmp_path / "log", "--socket", place)
        assert [folder.name for folder in Path(place).iterdir()] == [Path(str(found.far)).parent.name]
        assert found.stop() == 0
        assert list(Path(place).iterdir()) == []


def test_a_port_that_is_taken_is_passed_over(board: Board) -> None:
    assert isinstance(board.far, int)
    with module._on_loopback(range(board.far, board.far + 50)) as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1" and port > board.far
        line = module.directions(listener, "word", {"SLURM_JOB_ID": "1"})[1]
    assert f"-L 6006:127.0.0.1:{port} -J LOGIN_NODE {socket.gethostname()}" in line


def test_the_directions_are_those_of_the_place(tmp_path: Path) -> None:
    """In a job, on a machine that one came to by ssh, and on one's own."""
    with module._on_loopback([0]) as listener:
        port = listener.getsockname()[1]
        of_job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_HOST": "login", "SLURMD_NODENAME": "n1"}
        far = f"ssh -N -L 6006:127.0.0.1:{port}"
        assert module.directions(listener, "word", of_job)[1] == f"  {far} -J login n1"
        by_ssh = module.directions(listener, "word", {"SSH_CONNECTION": "a 1 b 2"})
        assert by_ssh[1] == f"  {far} {socket.gethostname()}"
        (here,) = module.directions(listener, "word", {})
        assert f"http://localhost:{port}/word/ " in here and "ssh" not in here
    with module._in_folder(tmp_path) as listener:  # which no browser opens by itself
        assert module.directions(listener, "word", {})[1].startswith("  ssh -N -L 6006:/")


def refusal(*words: object) -> str:
    command = [sys.executable, "-m", "agrivision", "tensorboard", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_what_cannot_be_served_is_one_line(
    runs: Path, board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = tmp_path / "nowhere"
    assert refusal(nowhere) == f"agrivision: error: no such folder: {nowhere}\n"
    taken = refusal(runs, "--port", board.far)
    assert "in use" in taken and "without --port" in taken and taken.count("\n") == 1
    assert "no port" in refusal(runs, "--port", 70000)
    assert "leave out" in refusal(runs, "--port", 7007, "--socket")
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(module, "_tensorboard", lambda runs, token: None)
    with pytest.raises(BadInput, match="too long for a socket"):
        module.serve(tmp_path, socket_place=deep)
    assert list(deep.iterdir()) == []
