"""Where slurm/*.sbatch enter: a requeued job goes on in the code that it was submitted with.

    python -m launch.entry train --config FILE --run_dir DIR …

Slurm keeps the batch script, not what it calls: by the time a job is requeued, that may have been
edited, and half-way at that. So this module imports nothing of the package before it has looked for the
job's own copy.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(words: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Run the batch side of a job: its own copy where there is one, else that of today."""
    folder, spec = frozen(words, environment)
    if spec:
        become_frozen(folder, spec)
    from launch.batch import main as first_attempt  # noqa: PLC0415

    return first_attempt(words)


def frozen(words: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """The job directory and the specification of a job that has been frozen; empty where it was not."""
    command, arguments = (words[0], words[1:]) if words else ("", ())
    folder, task = job_folder(command, arguments), environment.get("SLURM_ARRAY_TASK_ID", "")
    array = environment.get("SLURM_ARRAY_JOB_ID", "")
    job = f"{array}_{task}" if task else environment.get("SLURM_JOB_ID", "")
    requeued = environment.get("SLURM_RESTART_COUNT", "0") != "0"
    if not requeued or not folder or job not in _jobs(f"{folder}/submissions.jsonl"):
        return "", ""
    spec = f"{folder}/job-{task}.json" if task else f"{folder}/job.json"
    whole = os.path.isfile(spec) and os.path.isdir(f"{folder}/code")  # noqa: PTH112, PTH113
    # Else the batch side of today says what is wrong with it, in one line.
    return (folder, spec) if whole and _own(folder, spec, f"{folder}/code") else ("", "")


def _own(folder: str, *inside: str) -> bool:
    """Whether a folder and what is in it are this user's or root's; see `agrivision.ownership`."""
    paths = (folder, *inside, *(os.path.realpath(path) for path in inside))
    owners = {os.lstat(path).st_uid for path in paths}
    return owners <= {os.geteuid(), 0} and not os.stat(folder).st_mode & 0o022  # noqa: PTH116


def _jobs(file: str) -> set[str]:
    found = set()
    try:
        with open(file, encoding="utf-8") as lines:  # noqa: PTH123
            for line in lines:
                try:
                    found.add(str(json.loads(line)["job"]))
                except (ValueError, KeyError, TypeError):  # torn by a kill
                    continue
    except OSError:
        pass
    return found


def become_frozen(folder: str, spec: str) -> None:
    """Replace this process by the batch side that was frozen with the job."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # until it listens; there are no ranks to tell yet
    command = [sys.executable, "-m", "launch.batch", "run", spec]
    os.execve(sys.executable, command, with_code(f"{folder}/code", os.environ))  # noqa: S606  # words, no shell # nosec B606


def with_code(code: str, environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which Python finds the frozen code first."""
    path = [code, environment.get("PYTHONPATH", "")]
    # Else the folder in which a module is started comes before all others: sbatch's, often a checkout.
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}
    return {**environment, **own}


def job_folder(command: str, arguments: Sequence[str]) -> str:
    """Where the files of a command's job go: in the run directory, or beside what it writes.

    Args:
        command: `train`, `prepare`, `evaluate` or `predict`.
        arguments: that follow it.

    Returns:
        An absolute path; empty where the arguments do not say.
    """
    if command == "prepare":
        out = next((word for word in arguments[1:2] if not arguments[0].startswith("-")), "")
        out = "" if out.startswith("-") else out
    else:
        flag = {"train": "--run_dir", "evaluate": "--checkpoint", "predict": "--out"}.get(command, "")
        out = value_of(arguments, flag) or ""
    suffix = {"train": "/launch", "evaluate": ".evaluate.launch"}.get(command, ".launch")
    return os.path.abspath(out) + suffix if out else ""  # noqa: PTH100 - Path.resolve follows links


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """What follows a flag on a command line, `--flag value` or `--flag=value`; the last one counts."""
    found = None
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            found = arguments[place + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
