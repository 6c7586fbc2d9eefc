"""Slurm: does it answer, where do jobs run, and what happens to them when they have to make room."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from agrivision import slurm
from agrivision.doctor.finding import Finding, Topic
from agrivision.doctor.pace import Pace
from agrivision.slurm import SlurmError

_SLURM = Topic("Slurm")
_OLDEST = (20, 11)  # what is older was never tried, and has no --requeue in arrays' tasks as used here
_TRIED = "22.05"
_REMEMBERED = 60  # seconds
_SHORT_LIMIT = 10  # times the warning
_ASK_SECONDS = 30.0
_USABLE = re.compile(r"(idle|mixed|allocated|completing|planned)(?![*$])", re.ASCII)
_JOB = "#!/bin/bash\ntrue\n"

Call = Callable[..., str]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What jobs will ask for.

    Attributes:
        partition: None takes the cluster's default.
        account: None takes the user's default.
        qos: likewise.
        gpus_per_node: None for none.
        signal_seconds: so long before its limit a job is warned.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: str | None = None
    signal_seconds: int = slurm.SIGNAL_SECONDS

    @property
    def options(self) -> list[str]:
        """For sbatch and srun."""
        named = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "gpus-per-node": self.gpus_per_node,
        }
        return [f"--{name}={value}" for name, value in named.items() if value]


def ask(command: Sequence[str], text: str = "", *, check: bool = True) -> str:
    """What one of Slurm's commands says, on both of its streams, to a user outside of any job.

    Args:
        command: program and arguments.
        text: for its standard input.
        check: whether a failure is an error.

    Raises:
        SlurmError: it failed, or did not answer.
    """
    environment = slurm.clean_environment(os.environ)
    done = slurm.call(command, check=check, environment=environment, text=text, seconds=_ASK_SECONDS)
    return done.stdout + done.stderr


def missing(call: Call = ask) -> Finding | None:
    """Says that there is no Slurm, or that it has not been told where its cluster is; else None.

    Args:
        call: asks Slurm.
    """
    if not slurm.available():
        return _SLURM.good("not here: runs start on this machine alone")
    try:
        call(["sinfo", "--version"])
    except SlurmError as error:
        return _SLURM.careful(
            f"its commands are here, but know no cluster: {error}",
            "set SLURM_CONF, or go to a node of the cluster; `make cluster` starts one of your own",
        )
    return None


def examine_slurm(wanted: Wanted, pace: Pace, call: Call = ask) -> Iterator[Finding]:
    """All that can be asked without a job.

    Args:
        wanted: by jobs.
        pace: of a run.
        call: asks Slurm.
    """
    try:
        yield version(call(["sinfo", "--version"]))
        controllers = call(["scontrol", "ping"], check=False)  # the others try for ten seconds
        if "is UP" not in controllers:
            raise SlurmError(controllers.strip().partition("\n")[0])
        settings = slurm.settings(call(["scontrol", "show", "config"]))
        partitions = [
            slurm.fields(line)
            for line in call(["scontrol", "--oneliner", "show", "partition"]).splitlines()
            if line.strip()
        ]
        nodes = call(["sinfo", "--noheader", "--Node", "--format=%R|%N|%T|%G"])
    except SlurmError as error:
        yield _no_answer(error)
        return
    yield _controllers(controllers, settings)
    yield from examine_settings(settings, wanted, pace)
    yield from examine_partitions(partitions, nodes, wanted, settings, pace)
    yield from limits(settings, call)
    yield accepted(wanted, call)


def _no_answer(error: SlurmError) -> Finding:
    text = str(error)
    if re.search(r"[Aa]uthenti|munge|credential", text):
        return _SLURM.bad(
            f"it does not believe who you are: {text}",
            "munge is not in order on this node: is munged running, is the clock right?",
        )
    return _SLURM.bad(
        f"its controller does not answer: {text}",
        "running jobs go on, and wait for it when they end; tell the admin if this lasts",
    )


def _controllers(text: str, settings: Mapping[str, str]) -> Finding:
    name = settings.get("ClusterName", "")
    down = [line.strip() for line in text.splitlines() if line.rstrip().endswith("is DOWN")]
    if down:
        return _SLURM.careful(
            f"cluster {name} answers, but {'; '.join(down)}", "jobs run; tell the admin"
        )
    return _SLURM.good(f"cluster {name}: its controller answers")


def version(text: str) -> Finding:
    """Whether it is one that the batch side knows.

    Args:
        text: `slurm-wlm 22.05.8`.
    """
    match = re.search(r"(\d+)\.(\d+)(?:\.\d+)?", text)
    if match is None:
        return _SLURM.careful(f"version {text.strip()!r}", f"what it does was measured on {_TRIED}")
    if (int(match[1]), int(match[2])) < _OLDEST:
        return _SLURM.careful(
            f"version {match[0]}",
            f"what it does was measured on {_TRIED}: try a short run and a requeue first",
        )
    return _SLURM.good(f"version {match[0]}")


def examine_settings(settings: Mapping[str, str], wanted: Wanted, pace: Pace) -> Iterator[Finding]:
    """What holds for the whole cluster.

    Args:
        settings: of `scontrol show config`.
        wanted: by jobs.
        pace: of a run.
    """
    if settings.get("AuthType") == "auth/none":
        yield _SLURM.careful(
            "AuthType is auth/none: it believes whoever connects",
            "right for a cluster of one's own on this machine, and for no other",
        )
    if settings.get("JobRequeue") == "0":
        yield _SLURM.careful(
            "JobRequeue is 0: jobs are not requeued unless they ask for it",
            "slurm/*.sbatch and launch ask (--requeue); your own scripts must. Where that is refused,"
            " a successor job is submitted",
        )
    else:
        yield _SLURM.good("JobRequeue is 1: jobs may go back into the queue")
    yield _SLURM.good(f"a run that is told to stop needs {pace}")
    yield _SLURM.graded(
        wanted.signal_seconds,
        pace.needed,
        pace.needed / 2,
        f"jobs are warned {wanted.signal_seconds} s before their limit, and need {pace.needed} s",
        f"ask for --signal=USR1@{2 * pace.needed} (launch: --signal_seconds {2 * pace.needed})",
    )
    wait = _seconds(settings.get("KillWait", ""))
    yield _SLURM.graded(
        wait,
        pace.needed,
        0,
        f"KillWait is {wait:.0f} s: so long a job has after `scancel`",
        f"a run needs {pace.needed} s: a cancelled one may lose what came after its last save",
    )
    remembered = _seconds(settings.get("MinJobAge", ""))
    yield _SLURM.graded(
        remembered,
        _REMEMBERED,
        0,
        f"MinJobAge is {remembered:.0f} s: so long ended jobs are known",
        "`launch status` says little of jobs that have just ended",
    )


def _seconds(text: str) -> float:
    """`30 sec` → 30."""
    match = re.match(r"\d+", text)
    return float(match[0]) if match else 0.0


def examine_partitions(
    partitions: Sequence[Mapping[str, str]],
    nodes: str,
    wanted: Wanted,
    settings: Mapping[str, str],
    pace: Pace,
) -> Iterator[Finding]:
    """Each partition: is it up, has it nodes, how long may jobs run, and what if they must make room.

    Args:
        partitions: the fields of each, of `scontrol show partition`.
        nodes: lines `partition|node|state|resources` of sinfo.
        wanted: by jobs; the partitions that it names have to be in order, the others need not.
        settings: of the cluster.
        pace: of a run.
    """
    names = [each["PartitionName"] for each in partitions]
    default = [each["PartitionName"] for each in partitions if each.get("Default") == "YES"]
    chosen = wanted.partition.split(",") if wanted.partition else default
    for name in sorted(set(chosen) - set(names)):
        yield _SLURM.bad(f"there is no partition {name}", f"the partitions are {', '.join(names)}")
    if not chosen:
        yield _SLURM.careful("no partition is the default", f"--partition, one of {', '.join(names)}")
    found = [line.split("|", 3) for line in nodes.splitlines() if line.count("|") >= 3]
    for each in partitions:
        own = [
            (node, state, gres) for name, node, state, gres in found if name == each["PartitionName"]
        ]
        needed = each["PartitionName"] in chosen
        yield from _partition(each, own, wanted, needed=needed)
        yield from _preemption(each, settings, pace, needed=needed)


def _partition(
    fields: Mapping[str, str], nodes: Sequence[tuple[str, str, str]], wanted: Wanted, *, needed: bool
) -> Iterator[Finding]:
    name = fields["PartitionName"]
    fault = _SLURM.bad if needed else _SLURM.careful
    usable = [(node, gres) for node, state, gres in nodes if _USABLE.match(state)]
    limit = slurm.seconds_of(fields.get("MaxTime", ""))
    gpus = sorted({gres.split("(")[0] for _, gres in usable if gres.startswith("gpu")})
    what = (
        f"partition {name}{' (default)' if fields.get('Default') == 'YES' else ''}:"
        f" {fields.get('State', '?')}, {len(usable)} of {len(nodes)} nodes in order,"
        f" limit {fields.get('MaxTime', '?').lower()}{', ' + ' '.join(gpus) if gpus else ''}"
    )
    if fields.get("State") != "UP":
        yield fault(what, "jobs there wait until the admin opens it: choose another (--partition)")
    elif not usable:
        states = ", ".join(sorted({state for _, state, _ in nodes})) or "none at all"
        yield fault(f"{what}; its nodes: {states}", "choose another (--partition); `sinfo -R` says why")
    elif limit is not None and limit < _SHORT_LIMIT * wanted.signal_seconds:
        yield _SLURM.careful(
            what,
            f"{wanted.signal_seconds} s of each attempt are warning: choose another for long runs",
        )
    elif needed and wanted.gpus_per_node and not gpus:
        yield _SLURM.bad(f"{what}, no GPUs", "choose one with GPUs (--partition)")
    else:
        yield _SLURM.good(what)


def _preemption(
    fields: Mapping[str, str], settings: Mapping[str, str], pace: Pace, *, needed: bool
) -> Iterator[Finding]:
    """What happens to jobs of a partition that others push aside.

    They get SIGTERM at once, and SIGKILL after the partition's grace and the cluster's KillWait.
    """
    mode = fields.get("PreemptMode") or settings.get("PreemptMode", "OFF")
    if settings.get("PreemptType", "preempt/none") == "preempt/none" or mode.startswith("OFF"):
        return
    name = fields["PartitionName"]
    if "SUSPEND" in mode or "GANG" in mode:
        yield _SLURM.careful(
            f"partition {name}: preempted jobs are suspended ({mode})",
            "they keep their memory and go on later; a run's watchdog knows that",
        )
        return
    grace, wait = _seconds(fields.get("GraceTime", "")), _seconds(settings.get("KillWait", ""))
    comes_back = "is requeued" if "REQUEUE" in mode else "is cancelled, and requeues itself"
    what = (
        f"partition {name}: a preempted job {comes_back} (PreemptMode={mode}); it has {grace:.0f} s"
        f" (GraceTime) and {wait:.0f} s (KillWait) to save"
    )
    advice = (
        f"a run needs {pace.needed} s: what came after its last save may be lost; save more often"
        " (--training.checkpoint_every_minutes), or ask the admin for a longer GraceTime"
    )
    if grace == 0 and grace + wait >= pace.needed:
        yield _SLURM.careful(
            what, "no grace at all: it saves in time only as long as a save is this quick"
        )
    else:
        yield _SLURM.graded(grace + wait, pace.needed, pace.needed / 2 if needed else 0, what, advice)


def limits(settings: Mapping[str, str], call: Call) -> Iterator[Finding]:
    """How many jobs there may be, and what accounting allows this user.

    Args:
        settings: of the cluster.
        call: asks Slurm.
    """
    jobs, array = settings.get("MaxJobCount", "?"), settings.get("MaxArraySize", "?")
    yield _SLURM.good(f"up to {jobs} jobs at once, arrays with indexes below {array}")
    if not settings.get("AccountingStorageType", "").endswith("slurmdbd"):
        yield _SLURM.good("no accounting: nothing here needs it")
        return
    columns = ("Account", "Partition", "QOS", "MaxJobs", "MaxSubmit", "MaxWall", "GrpTRES", "MaxTRES")
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", "where"]
    try:
        answer = call([*command, f"user={_own_name()}", f"format={','.join(columns)}"])
    except SlurmError as error:
        yield _SLURM.careful(
            f"accounting does not answer: {error}", "limits of your account are not known"
        )
        return
    rows = [line.split("|") for line in answer.splitlines() if line.count("|") == len(columns) - 1]
    if not rows and settings.get("AccountingStorageEnforce", "none") != "none":
        yield _SLURM.bad("you have no account", "ask the admin for one: jobs without are refused")
    for row in rows:
        said = _pairs(zip(columns, row, strict=True))
        if row[columns.index("MaxSubmit")] == "1" or row[columns.index("MaxJobs")] == "1":
            yield _SLURM.careful(
                f"your account: {said}", "one job at a time: no arrays, sweeps or pipelines"
            )
        else:
            yield _SLURM.good(f"your account: {said}")


def _own_name() -> str:
    """The user as accounting knows them: sacctmgr compares names, and a number is none of them."""
    uid = os.getuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # as in a container that has no list of users
        return str(uid)


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs if value)


def accepted(wanted: Wanted, call: Call) -> Finding:
    """Whether a job like ours would be taken.

    Args:
        wanted: by jobs.
        call: asks Slurm.
    """
    minutes = wanted.signal_seconds // 60 + 2
    command = [
        "sbatch",
        "--test-only",
        "--job-name=agrivision-doctor",
        "--requeue",
        "--open-mode=append",
        f"--signal=USR1@{wanted.signal_seconds}",
        f"--time={minutes}",
        *wanted.options,
    ]
    try:
        said = call(command, _JOB)
    except SlurmError as error:
        return _SLURM.bad(
            f"a job like ours is refused: {error}",
            "give what it asks for: --partition, --account, --qos, --gpus_per_node",
        )
    match = re.search(r"to start at (\S+) .* in partition (\S+)", said)
    when = f": partition {match[2]}, from {match[1]}" if match else ""
    return _SLURM.good(f"a job like ours is accepted{when}")
