"""A tiny job on a node: does this very Python start there, and see what it needs.

    python -m agrivision.doctor.node TOKEN [FOLDER …]       the job's side

Each FOLDER holds a file of the name TOKEN, which the other side made; the job makes one beside it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import agrivision
from agrivision import slurm
from agrivision.doctor.cluster import Wanted
from agrivision.doctor.disks import nearest, own_folder
from agrivision.doctor.finding import Finding, Topic
from agrivision.errors import AgrivisionError
from agrivision.json_values import entries, parse

_NODE = Topic("Node")
_MARK = "agrivision doctor: "
_MINUTES = 10  # of the job, longer than anybody waits here
_RUN_SECONDS = 300.0  # torch comes off a shared file system for the first time
_END_SECONDS = 10.0
_LATE_SECONDS = 60.0  # NFS shows a new file to others half a minute late
_POLL_SECONDS = 0.2
_SKEW = 5.0
_SLOW_IMPORT = 60.0


def examine_on_node(
    wanted: Wanted,
    folders: Sequence[Path],
    data: Path | None,
    *,
    wait_seconds: int,
    python: str = sys.executable,
) -> Iterator[Finding]:
    """Run the job, and say what it saw.

    Args:
        wanted: what the job asks for.
        folders: in which both sides write, of runs; they need not be there yet.
        data: that the job should see; None for none.
        wait_seconds: for a node.
        python: that is to start there.
    """
    token = secrets.token_hex(8)
    with ExitStack() as stack:
        try:
            own = [stack.enter_context(own_folder(nearest(folder))) for folder in folders]
            for folder in own:
                (folder / token).touch()
        except (OSError, AgrivisionError) as error:
            yield _NODE.bad(f"nothing tried: {error}", "see the lines on this folder above")
            return
        paths = [*own, *([data.absolute()] if data is not None else [])]
        command = [python, "-m", "agrivision.doctor.node", token, *map(str, paths)]
        begin = time.time()
        code, output = _srun(wanted, command, token, wait_seconds)
        end = time.time()
        seen = _told(output)
        if seen is None:
            yield _failed(code, output, python, wait_seconds)
            return
        runs = dict(zip(map(str, own), folders, strict=True))
        yield from judge(seen, runs, data, begin=begin, end=end)
        for folder, named in zip(own, folders, strict=True):
            if str(folder) in seen["folders"] and seen["folders"][str(folder)] == "":
                yield _comes_back(folder / f"{token}.node", named)


def _srun(wanted: Wanted, command: Sequence[str], token: str, wait_seconds: int) -> tuple[int, str]:
    """Run a command as a job; whatever happens, the job is gone afterwards."""
    name = f"agrivision-doctor-{token}"
    words = [
        "srun",
        f"--job-name={name}",
        "--nodes=1",
        "--ntasks=1",
        f"--time={_MINUTES}",
        f"--immediate={wait_seconds}",
        "--input=none",
        *wanted.options,
        *command,
    ]
    environment = slurm.clean_environment(os.environ)
    root = str(Path(agrivision.__file__).parents[1])
    known = filter(None, [environment.get("PYTHONPATH")])
    environment["PYTHONPATH"] = os.pathsep.join([root, *known])
    try:
        process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        return 127, "no srun on the PATH"
    try:
        output, _ = process.communicate(timeout=wait_seconds + _RUN_SECONDS)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return 124, f"nothing heard within {wait_seconds + _RUN_SECONDS:.0f} s"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_END_SECONDS)
            process.kill()
            process.communicate()
            with suppress(slurm.SlurmError):
                slurm.call(["scancel", f"--name={name}", f"--user={os.getuid()}"])


def _told(output: str) -> dict[str, Any] | None:
    """What the job said; modules and prologs may have said other things before."""
    for line in output.splitlines():
        if line.startswith(_MARK):
            with suppress(ValueError):
                return dict(entries(parse(line.removeprefix(_MARK).encode())))
    return None


def _failed(code: int, output: str, python: str, wait_seconds: int) -> Finding:
    """Why the job said nothing."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "Unable to allocate resources" in output:
        return _NODE.careful(
            f"no node within {wait_seconds} s: {lines[-1]}",
            "busy, or the wrong partition: --partition, or --wait_seconds for a longer wait",
        )
    start = next((line for line in lines if "execve()" in line or "No module named" in line), "")
    if start:
        return _NODE.bad(
            f"{python} does not start there: {start}",
            "install it where all nodes see it, or activate it in site.sh (slurm/README.md)",
        )
    said = lines[-1] if lines else "it said nothing"
    return _NODE.bad(f"the job ended with {code}: {said}", "try `srun` with the same options by hand")


def judge(
    seen: Mapping[str, Any],
    runs: Mapping[str, Path],
    data: Path | None,
    *,
    begin: float,
    end: float,
) -> Iterator[Finding]:
    """What to make of what the job saw.

    Args:
        seen: see `look`.
        runs: the folders that were made for it, and those that the user named.
        data: that it should have seen.
        begin: when it was asked for, by this machine's clock.
        end: when it was over: a wait for a node lies before its look, an epilog after it.
    """
    skew = max(begin - seen["time"], seen["time"] - end)
    yield _NODE.good(f"{seen['host']}: Python {seen['python']}, agrivision {seen['agrivision']}")
    if seen["torch_error"]:
        yield _NODE.bad(
            f"{seen['host']}: torch does not load: {seen['torch_error']}", "install it for these nodes"
        )
    else:
        took = f"torch {seen['torch']} loads in {seen['torch_seconds']:.1f} s"
        what = f"{seen['host']}: {took}, and sees {seen['gpus']} GPUs"
        slow = "each rank waits that long: put the environment on a faster disk, or into one image file"
        yield _NODE.graded(-seen["torch_seconds"], -_SLOW_IMPORT, -_RUN_SECONDS, what, slow)
    if skew > _SKEW:
        yield _NODE.careful(
            f"{seen['host']}: its clock is at least {skew:.0f} s off this one",
            "tell the admin (NTP): logs mislead",
        )
    for path, error in seen["folders"].items():
        named = runs.get(path, data)
        if error:
            yield _NODE.bad(
                f"{seen['host']} does not see {named}: {error}", "choose a folder that all nodes share"
            )
        else:
            yield _NODE.good(f"{seen['host']} sees {named}")


def _comes_back(file: Path, named: Path) -> Finding:
    """Whether what the node wrote is seen here, and when."""
    begin = time.monotonic()
    while not file.exists():
        if time.monotonic() - begin > _LATE_SECONDS:
            return _NODE.bad(
                f"what it wrote into {named} is not seen here after {_LATE_SECONDS:.0f} s",
                "it has another folder of that name: choose one that all nodes share",
            )
        with suppress(OSError):
            os.listdir(file.parent)  # noqa: PTH208 - asks the server anew
        time.sleep(_POLL_SECONDS)
    return _NODE.good(
        f"what it wrote into {named} is seen here, {time.monotonic() - begin:.1f} s later"
    )


def look(token: str, folders: Sequence[Path]) -> dict[str, Any]:
    """The job's side: what it sees.

    Args:
        token: name of a file in those folders that the other side made.
        folders: to look at; one without such a file is only read.
    """
    begin = time.perf_counter()
    torch_version, gpus, error = "", 0, ""
    try:
        import torch  # noqa: PLC0415 - it is looked whether it can be

        torch_version, gpus = str(torch.__version__), torch.cuda.device_count()
    except Exception as fault:  # whatever it is, it is told
        error = f"{type(fault).__name__}: {fault}"
    return {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "python": sys.version.split()[0],
        "agrivision": agrivision.__version__,
        "torch": torch_version,
        "torch_error": error,
        "torch_seconds": time.perf_counter() - begin,
        "gpus": gpus,
        "folders": {str(folder): _sees(folder, token) for folder in folders},
        "time": time.time(),
    }


def _sees(folder: Path, token: str) -> str:
    """What is wrong with a folder; empty where nothing is."""
    try:
        names = {path.name for path in folder.iterdir()}
        if token in names:
            (folder / f"{token}.node").touch()
    except OSError as error:
        return error.strerror or str(error)
    if folder.name.startswith(".agrivision-doctor-") and token not in names:
        return "it is another folder of that name"
    return ""


def main(argv: Sequence[str]) -> None:
    """Say what is seen, in one line."""
    seen = look(argv[0], [Path(text) for text in argv[1:]])
    sys.stdout.write(f"\n{_MARK}{json.dumps(seen)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
