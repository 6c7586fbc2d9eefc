"""A real Slurm on this machine, without root, without munge, without a file outside of one folder.

`python -m launch.cluster start` starts a controller and four nodes and prints what to export;
`python -m launch.cluster stop` ends them and whatever their jobs left running. The tests use the same.

Seen with Debian's Slurm 22.05.8, as root and as a plain user: with NoCtldInAddrAny and NoInAddrAny the
daemons, and srun too, listen on the address that this machine's name resolves to and on no other (`ss
-ltnp` showed 127.0.0.1 only); where the name does not resolve they do not start so. A requeued job
waits one second longer than AuthInfo's cred_expire, which has to be 5 or more; a step still starts on a
node that answers later than that. gres.conf takes no regular file for a GPU, but a link to a device.

There is no authentication: who can connect to the daemons can run commands as the user who started
them. On loopback that is every user of this machine.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agrivision.errors import AgrivisionError, BadInput, ExitCode
from agrivision.storage import make_private, remove_tree, write_atomically
from launch import keeper
from launch.cluster_files import (
    PROGRAMS,
    ClusterOptions,
    find_address,
    find_programs,
    free_ports,
    gres_conf,
    slurm_conf,
)

__all__ = ["Cluster", "ClusterError", "ClusterOptions", "default_folder", "find_programs"]

_MARK = "AGRIVISION_CLUSTER"  # in the environment of daemons and of their steps, not in that of jobs
_SLURMS_OWN = re.compile(r"(SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SINFO|SCANCEL)_")
_START_SECONDS, _STOP_SECONDS, _POLL_SECONDS = 60.0, 30.0, 0.02
_RECORD = "cluster.json"
_LOCK = ".lock"
_CONTROLLER = "slurmctld"
# A step's socket lies below the folder, and the kernel takes 107 bytes for its name.
_LONGEST_FOLDER = 70
_EXCERPT_LINES = 3


class ClusterError(AgrivisionError):
    """Slurm did not do what it was asked for; the message ends with what it said."""


@dataclass(frozen=True)
class Cluster:
    """A cluster in its folder, running or not; any process of the same user can take hold of it so.

    Attributes:
        folder: holds its configuration, state, logs and pid files, and nothing else.
    """

    folder: Path

    def __post_init__(self) -> None:
        # One name for one folder, however it was said; a link in its place is refused, not followed.
        absolute = Path(os.path.abspath(self.folder))  # noqa: PTH100 - resolve() would follow it
        object.__setattr__(self, "folder", absolute.parent.resolve() / absolute.name)

    @classmethod
    def start(cls, folder: Path, options: ClusterOptions | None = None) -> Cluster:
        """Start the daemons, and wait until all nodes are idle.

        Args:
            folder: made where it is not there; what an earlier cluster left in it is removed.
            options: what the cluster is like; the defaults for None.

        Raises:
            BadInput: Slurm is not installed, or the folder or this machine's name will not do.
            ClusterError: a cluster runs there already, or a daemon did not come up.
        """
        options = options or ClusterOptions()
        programs = find_programs()
        address = find_address(any_interface=options.any_interface)
        cluster = cls(folder)
        cluster._prepare()
        with cluster._locked():
            if cluster._processes():
                raise ClusterError(f"a cluster runs in {cluster.folder} already: stop it first")
            cluster._clear()
            cluster._write(options, programs, address)
            try:
                cluster._start_all()
            except BaseException:
                cluster._kill_all()
                raise
        return cluster

    def stop(self) -> None:
        """End the daemons, at once, and everything that jobs left running; a stopped cluster is fine.

        The logs stay. Jobs get no signal to save by: `scancel` them first where that matters.

        Raises:
            ClusterError: a process does not go.
        """
        if self._record_file.is_file():
            with self._locked():
                self._kill_all()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def options(self) -> ClusterOptions:
        """What it was started with."""
        return ClusterOptions(**self._record["options"])

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes: n1, n2 and so on."""
        return self.options.node_names

    @property
    def running(self) -> bool:
        """Whether all daemons run."""
        names = [_CONTROLLER, *self.nodes] if self._record_file.is_file() else []
        return bool(names) and all(self.runs(name) for name in names)

    def runs(self, name: str) -> bool:
        """Whether a daemon runs: `slurmctld`, or a node's slurmd by the node's name."""
        return self._pid(name) is not None

    @property
    def environment(self) -> dict[str, str]:
        """What commands need in their environment to speak with this cluster."""
        known = [*filter(None, os.environ.get("PATH", "").split(os.pathsep))]
        commands = {str(Path(self._program(name)).parent) for name in PROGRAMS[2:]}
        missing = sorted(commands - set(known))
        path = {"PATH": os.pathsep.join([*known, *missing])} if missing else {}
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), **path}

    @property
    def complete_environment(self) -> dict[str, str]:
        """This process's environment, without traces of another Slurm, for a user of the cluster."""
        mine = {name: value for name, value in os.environ.items() if not _SLURMS_OWN.match(name)}
        return {**mine, **self.environment}

    def run(self, *command: str) -> str:
        """Run a command as a user of this cluster; returns its stdout.

        Args:
            command: one of Slurm's, or any other, and its arguments.

        Raises:
            ClusterError: it failed; the message is what it said.
        """
        done = subprocess.run(
            list(command),
            env=self.complete_environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise ClusterError(f"{shlex.join(command)}: {said}")
        return done.stdout

    def kill_node(self, name: str) -> None:
        """Kill a node's slurmd, as a crash would; what it started goes on."""
        self._kill(name)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd again, and wait until it listens."""
        self._wait({name: self._spawn(name)}, lambda: self.runs(name))

    def kill_controller(self) -> None:
        """Kill slurmctld; what it knows is on disk."""
        self._kill(_CONTROLLER)

    def start_controller(self) -> None:
        """Start slurmctld again with what it knew, and wait until it answers."""
        self._wait({_CONTROLLER: self._spawn(_CONTROLLER)}, lambda: bool(self.states()))

    def set_node(self, name: str, state: str, reason: str) -> None:
        """Set a node's state as an administrator does: `down`, `drain`, `resume`."""
        self.run("scontrol", "update", f"nodename={name}", f"state={state}", f"reason={reason}")

    def states(self) -> dict[str, str]:
        """The state of each node in sinfo's words, with `*` where it does not answer.

        Empty where the controller does not answer.
        """
        try:
            lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", "--partition=main")
        except ClusterError:
            return {}
        return dict(line.split(maxsplit=1) for line in lines.splitlines())

    # What the folder holds.

    @property
    def _record_file(self) -> Path:
        return self.folder / _RECORD

    @property
    def _record(self) -> Mapping[str, Any]:
        try:
            record = json.loads(self._record_file.read_text())
        except FileNotFoundError:
            raise BadInput(f"there is no cluster in {self.folder}: start one first") from None
        assert isinstance(record, dict)
        return record

    def _program(self, name: str) -> str:
        return str(self._record["programs"][name])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else starts or stops this cluster meanwhile."""
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _prepare(self) -> None:
        """Make the folder.

        Raises:
            BadInput: its name does not fit into slurm.conf, it is not ours, or it holds something else.
        """
        if not re.fullmatch(r"[\w./+:@~-]+", str(self.folder), re.ASCII):
            raise BadInput(
                f"Slurm takes no such path: {self.folder} (letters, digits and ./+:@~_- only)"
            )
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise BadInput(
                f"{self.folder} is too long: its sockets need {_LONGEST_FOLDER} bytes or less"
            )
        self._refuse_foreign()
        make_private(self.folder)
        self._refuse_foreign()  # somebody may have been quicker

    def _refuse_foreign(self) -> None:
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_symlink() or self.folder.stat().st_uid != os.getuid():
            raise BadInput(f"{self.folder} is a link or another user's: give a folder of your own")
        if not self.folder.is_dir() or (
            {path.name for path in self.folder.iterdir()} - {_LOCK} and not self._record_file.is_file()
        ):
            raise BadInput(f"{self.folder} holds other things: give an empty or a new folder")

    def _clear(self) -> None:
        """Remove what an earlier cluster left; its record stays until there is another."""
        for path in self.folder.iterdir():
            if path.name in (_RECORD, _LOCK):
                continue
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                path.unlink()

    def _write(self, options: ClusterOptions, programs: Mapping[str, str], address: str | None) -> None:
        record = {"options": asdict(options), "programs": programs}
        ports = free_ports(options.nodes + 1)
        # The record first: what it stands beside is ours to remove.
        write_atomically(self._record_file, json.dumps(record, indent=2).encode())
        write_atomically(
            self.folder / "slurm.conf", slurm_conf(self.folder, options, address, ports).encode()
        )
        write_atomically(self.folder / "gres.conf", gres_conf(self.folder, options).encode())
        make_private(self.folder / "state")
        for number in range(options.gpus):
            (self.folder / f"gpu{number}").symlink_to(os.devnull)

    # Daemons.

    def _start_all(self) -> None:
        keepers = {_CONTROLLER: self._spawn(_CONTROLLER, "-c")}
        keepers |= {name: self._spawn(name) for name in self.nodes}
        idle = dict.fromkeys(self.nodes, "idle")
        self._wait(keepers, lambda: self.states() == idle)

    def _spawn(self, name: str, *arguments: str) -> int:
        """Start a daemon under a keeper; returns the keeper's process id."""
        if name not in (_CONTROLLER, *self.nodes):
            raise BadInput(f"there is no node {name!r}; the nodes are {', '.join(self.nodes)}")
        if self.runs(name):
            raise ClusterError(f"{name} runs already in {self.folder}")
        program, which = ("slurmctld", []) if name == _CONTROLLER else ("slurmd", ["-N", name])
        command = [self._program(program), "-D", *which, *arguments]
        here = str(self.folder)
        started = subprocess.run(
            [sys.executable, "-I", "-S", keeper.__file__, str(self._output(name)), *command],
            env={**self.complete_environment, _MARK: here, keeper.MARK: here},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
        )
        return int(started.stdout)

    def _output(self, name: str) -> Path:
        return self.folder / f"{name}.out"

    def _pid(self, name: str) -> int | None:
        """The process of a daemon that has come up, None where it does not run."""
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None
        # The number may have gone to another process since.
        return pid if _marks(pid).get(_MARK) == str(self.folder) else None

    def _wait(self, keepers: Mapping[str, int], ready: Callable[[], bool]) -> None:
        """Wait until daemons are ready, and say what they logged if one is not."""
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            gone = [name for name, pid in keepers.items() if not _marks(pid)]
            if gone:
                raise ClusterError(f"{gone[0]} did not come up: {self._excerpt(gone[0])}")
            if time.monotonic() > deadline:
                said = "; ".join(f"{name}: {self._excerpt(name)}" for name in keepers)
                raise ClusterError(f"Slurm is not ready after {_START_SECONDS:.0f} s: {said}")
            time.sleep(_POLL_SECONDS)

    def _excerpt(self, name: str) -> str:
        """The last complaints of a daemon, or its last words."""
        try:
            lines = self._output(name).read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        complaints = [line for line in lines if re.search(r"\b(fatal|error|cannot)\b", line)]
        return " | ".join((complaints or lines)[-_EXCERPT_LINES:]) or "it said nothing"

    def _kill(self, name: str) -> None:
        pid = self._pid(name)
        if pid is None:
            raise ClusterError(f"{name} does not run in {self.folder}")
        os.kill(pid, signal.SIGKILL)
        _poll(lambda: not self.runs(name), f"{name} (process {pid}) does not go")

    # Processes.

    def _processes(self) -> dict[int, bool]:
        """All processes of the cluster, and whether each is a keeper.

        These are the marked ones, which are the keepers, the daemons and their steps, and all below
        them: the jobs. What a job has put into the background is below a keeper.
        """
        parents = _parents()
        marks = {pid: _marks(pid) for pid in parents}
        here = str(self.folder)
        found = {pid: keeper.MARK in mark for pid, mark in marks.items() if here in mark.values()}
        fresh = set(found)
        while fresh:
            fresh = {pid for pid, parent in parents.items() if parent in fresh and pid not in found}
            found |= dict.fromkeys(fresh, False)
        return found

    def _kill_all(self) -> None:
        """Kill all processes; the keepers end by themselves, when nothing is left that they keep."""

        def gone() -> bool:
            found = self._processes()
            for pid in (pid for pid, is_keeper in found.items() if not is_keeper):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not found

        _poll(gone, f"processes of the cluster in {self.folder} do not go")


def _poll(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + _STOP_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{complaint} within {_STOP_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


def _parents() -> dict[int, int]:
    """The parent of every process that is not dead."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with suppress(OSError):
            # The program's name, in parentheses, may hold anything; what follows it does not.
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(folder.name)] = int(parent)
    return found


def _marks(pid: int) -> dict[str, str]:
    """The marks that a process was started with, and whose: name → folder; none where it is dead."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # dead since, or another user's
        return {}
    pairs = (os.fsdecode(variable).partition("=") for variable in variables)
    return {name: value for name, _, value in pairs if name in (_MARK, keeper.MARK)}


def _running_folders() -> set[str]:
    """The folders of all clusters that this user may see."""
    return {folder for pid in _parents() for folder in _marks(pid).values()}


def default_folder() -> Path:
    """Where the commands below have their cluster: one place for each user, gone with the next boot."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    private = runtime.is_absolute() and runtime.is_dir() and runtime.stat().st_uid == os.getuid()
    return (runtime if private else Path(tempfile.gettempdir())) / f"agrivision-cluster-{os.getuid()}"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, and start or stop; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start a cluster, and print what to export")
    stop = commands.add_parser("stop", help="end it, and all of its jobs")
    for command in (start, stop):
        command.add_argument(
            "--folder", type=Path, default=default_folder(), help="default: %(default)s"
        )
    start.add_argument("--nodes", type=int, help=f"default: {ClusterOptions().nodes}")
    start.add_argument(
        "--any_interface", action="store_true", help="also where Slurm would listen to the network"
    )
    args = parser.parse_args(argv)
    try:
        if args.command == "start":
            _start(args.folder, args.nodes, any_interface=args.any_interface)
        else:
            _stop(args.folder)
    except AgrivisionError as error:
        sys.stderr.write(f"launch.cluster: error: {' '.join(str(error).split())}\n")
        return int(error.exit_code)
    return int(ExitCode.DONE)


def _start(folder: Path, nodes: int | None, *, any_interface: bool) -> None:
    """Start a cluster, or find it running; either way the output can be given to `eval`."""
    cluster = Cluster(folder)
    found = cluster.running
    if found and nodes not in (None, cluster.options.nodes):
        raise ClusterError(
            f"a cluster of {cluster.options.nodes} nodes runs in {folder} already: stop it first"
        )
    if not found:
        wanted = ClusterOptions(any_interface=any_interface)
        Cluster.start(folder, wanted if nodes is None else replace(wanted, nodes=nodes))
    options = cluster.options
    state = "runs already" if found else "runs"
    lines = [
        f"# Slurm {state} in {cluster.folder}: {options.nodes} nodes, each with {options.cpus} CPUs "
        f"and {options.gpus} GPUs, all invented",
        "# no passwords: any user of this machine can run commands as you",
        *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
        f"# to stop it: python -m launch.cluster stop --folder {cluster.folder}",
    ]
    sys.stdout.write("\n".join([*lines, ""]))


def _stop(folder: Path) -> None:
    cluster = Cluster(folder)
    others = sorted(_running_folders() - {str(cluster.folder)})
    found = bool(cluster._processes())
    cluster.stop()
    hint = f"; others run in {', '.join(others)}" if others else ""
    said = (
        f"stopped the cluster in {cluster.folder}" if found else f"no cluster runs in {cluster.folder}"
    )
    sys.stdout.write(f"{said}{hint}\n")


if __name__ == "__main__":
    sys.exit(main())
