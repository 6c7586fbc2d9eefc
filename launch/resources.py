"""What a job asks of the cluster: from a site profile, the environment and the command line.

Each later one beats the one before: the profile, its part for the command, `SBATCH_ACCOUNT` and its
like, what a job was submitted with before, the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import shlex
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from agrivision.errors import BadInput
from agrivision.ownership import read_own
from agrivision.slurm import SIGNAL_SECONDS
from launch.freeze import python_of_this

COMMANDS = ("train", "prepare", "evaluate", "predict")

_NODES = re.compile(r"([1-9]\d*)(?:-([1-9]\d*))?")
_GPUS = re.compile(r"(?:[\w.-]+:)?(\d+)", re.ASCII)
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
# What each text may hold. A node list with a slash would be a file's name to sbatch; what begins with a
# dash is an option to somebody.
_NAMES_OF_SLURM = r"[\w.+@][\w.+@-]*(?:,[\w.+@][\w.+@-]*)*"
_SHAPES = {
    "mem": (r"\d+(?:\.\d+)?[KMGT]?B?", "a size such as 64G"),
    "partition": (_NAMES_OF_SLURM, "a name, or several with commas"),
    "account": (_NAMES_OF_SLURM, "a name"),
    "qos": (_NAMES_OF_SLURM, "a name"),
    "reservation": (_NAMES_OF_SLURM, "a name"),
    "constraint": (r"[\w.+@(\[][\w.+@()\[\]&|*,:-]*", "features such as a100&ib or [rack1|rack2]"),
    "nodelist": (r"\w[\w.,\[\]-]*", "nodes such as n[1-4],n7"),
    "exclude": (r"\w[\w.,\[\]-]*", "nodes such as n[1-4],n7"),
    "gres": (r"\w[\w.:,=()-]*", "resources such as gpu:2,disk:100"),
    "mail_user": (r"[\w.+][\w.+@,-]*", "an address"),
    "mail_type": (r"\w+(?:,\w+)*", "events such as FAIL,END"),
    "dependency": (r"\w+(?:[:,?+*]\w+)*", "jobs such as afterok:17:18"),
}
_LONGEST = 1000  # sbatch reads each line into a buffer of some thousand bytes
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FLAGS = ("exclusive",)
_OPTIONS = "srun_args"  # its value begins with two dashes, as no other does
# What the shell's profile of many users sets for sbatch; it must not win over the command line here.
_ENVIRONMENT = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_TIMELIMIT": "time",
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks of the cluster. What is not given is left to the cluster's own defaults.

    Attributes:
        nodes: how many, or a range such as 2-4, of which each attempt takes what it gets.
        gpus_per_node: GPUs of each node, `4` or `a100:4`.
        gpus_per_task: GPUs that each rank alone can see.
        tasks_per_node: ranks on each node; null: one for each GPU, or one.
        cpus_per_task: cores of each rank.
        mem: memory of each node, for example 64G.
        partition: queue, or several with commas.
        account: that the time is charged to.
        qos: quality of service.
        time: limit of one attempt: minutes, 1:30:00 or 2-00:00:00; the run goes on in the next.
        constraint: features that the nodes must have.
        exclude: nodes that are not wanted.
        nodelist: nodes that are wanted.
        reservation: to run in.
        gres: further generic resources of each node.
        exclusive: nodes for this job alone.
        comment: text that Slurm keeps with the job.
        mail_user: whom Slurm writes to.
        mail_type: on which events, for example FAIL,END.
        dependency: what the job waits for, for example afterok:17.
        job_name: as squeue shows it; null: the name of what the job writes.
        signal_seconds: warn the ranks this long before the time limit, so that they save.
        max_attempts: start the job no more often than this altogether.
        parts: divide a preparation or a prediction among so many tasks of a job array.
        srun_args: further options of srun, as in a shell: '--cpu-bind=cores --mpi=none'.
    """

    nodes: str = "1"
    gpus_per_node: str | None = None
    gpus_per_task: str | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    reservation: str | None = None
    gres: str | None = None
    exclusive: bool = False
    comment: str | None = None
    mail_user: str | None = None
    mail_type: str | None = None
    dependency: str | None = None
    job_name: str | None = None
    signal_seconds: int = SIGNAL_SECONDS
    max_attempts: int = 100
    parts: int = 1
    srun_args: str | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, str):
                check_text(f"--{name}", value)
                _require(len(value) <= _LONGEST, name, value, f"no longer than {_LONGEST} characters")
        for name, (shape, wanted) in _SHAPES.items():
            value = getattr(self, name)
            good = value is None or re.fullmatch(shape, value, re.ASCII | re.IGNORECASE) is not None
            _require(good, name, value, wanted)
        nodes = _NODES.fullmatch(self.nodes)
        wanted = "a number of nodes, or a range such as 2-4"
        _require(nodes is not None and self.least_nodes <= self.most_nodes, "nodes", self.nodes, wanted)
        for name in ("gpus_per_node", "gpus_per_task"):
            value = getattr(self, name)
            good = value is None or _GPUS.fullmatch(value) is not None
            _require(good, name, value, "a number, or a type and a number such as a100:4")
        for name in ("tasks_per_node", "cpus_per_task", "signal_seconds", "max_attempts", "parts"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        if self.minutes is not None and self.signal_seconds >= 60 * self.minutes:
            raise BadInput(
                f"--signal_seconds is {self.signal_seconds}, and --time allows only {60 * self.minutes}"
                " seconds: the job would be told to stop at once; make one shorter or the other longer"
            )
        try:
            shlex.split(self.srun_args or "")
        except ValueError as error:
            raise BadInput(f"--srun_args is {self.srun_args!r}: {error}") from None

    @property
    def least_nodes(self) -> int:
        """Fewer nodes than this do not start the job."""
        return int(self.nodes.partition("-")[0])

    @property
    def most_nodes(self) -> int:
        """It gets no more nodes than this."""
        return int(self.nodes.rpartition("-")[2])

    @property
    def elastic(self) -> bool:
        """Whether the job may start, and go on, with different numbers of nodes."""
        return self.least_nodes < self.most_nodes

    @property
    def ranks_per_node(self) -> int:
        """Tasks on each node: as told, else one for each GPU, else one."""
        if self.tasks_per_node is not None:
            return self.tasks_per_node
        gpus = _GPUS.fullmatch(self.gpus_per_node or "1")
        assert gpus is not None
        return max(1, int(gpus[1]))

    @property
    def minutes(self) -> int | None:
        """The time limit, rounded up; None: the partition's own."""
        if self.time is None:
            return None
        found = _TIME.fullmatch(self.time)
        _require(found is not None, "time", self.time, "minutes, hours:minutes:seconds or days-hours")
        assert found is not None
        days, *rest = found.groups()
        if days is None and rest[2] is None:
            rest = [None, *rest[:2]]  # minutes, or minutes:seconds
        hours, minutes, seconds = (int(part or 0) for part in rest)
        found_minutes = (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)
        _require(found_minutes > 0, "time", self.time, "more than nothing")
        return found_minutes

    def given(self) -> dict[str, Any]:
        """What differs from the defaults, for job.json."""
        return {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if getattr(self, entry.name) != entry.default
        }


def _require(condition: bool, name: str, value: object, wanted: str) -> None:
    if not condition:
        raise BadInput(f"--{name} is {value!r}: it must be {wanted}")


def check_text(what: str, text: str) -> None:
    """Refuse line breaks, their like, and bytes that are no text: no script or log can write them.

    Raises:
        BadInput: there is one.
    """
    if _CONTROL.search(text):
        raise BadInput(
            f"{what} is {text!r}: a line break or another control character cannot stand there"
        )


NAMES = tuple(entry.name for entry in dataclasses.fields(Resources))
_TEXTS = {entry.name for entry in dataclasses.fields(Resources) if entry.type == "str | None"}
_UNSET = ("", "null")


def build(*layers: Mapping[str, Any]) -> Resources:
    """Make resources of texts.

    Args:
        layers: name → value, as it would stand on the command line; later ones beat earlier ones.

    Raises:
        BadInput: a value is wrong.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    given = {name: _written(value) for name, value in merged.items()}
    # As YAML, which the parser reads, a text that begins with # is nothing.
    texts = {
        name: None if value in _UNSET else value for name, value in given.items() if name in _TEXTS
    }
    try:
        parsed = _parser().parse_args([f"--{name}={given[name]}" for name in given.keys() - _TEXTS])
    except ArgumentError as error:
        raise _shortened(str(error), merged) from None
    return Resources(**{name: getattr(parsed, name) for name in NAMES} | texts)


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shortened(text: str, values: Mapping[str, Any]) -> BadInput:
    found = re.search(r'[Kk]ey "([^"]+)"', text)
    if found is None or found[1] not in values:
        return BadInput(" ".join(text.split()))
    name = found[1]
    wanted = "true or false" if name in _FLAGS else "a whole number"
    return BadInput(f"--{name} is {values[name]!r}: it must be {wanted}")


@functools.cache
def _parser() -> jsonargparse.ArgumentParser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog="python -m launch", exit_on_error=False)
    parser.add_class_arguments(Resources, nested_key=None)
    return parser


def describe() -> str:
    """All resources with their meanings, for --help."""
    text = _parser().format_help()
    return text[text.index("  --nodes") :].rstrip() + "\n"


@dataclass(frozen=True)
class Words:
    """A command line, taken apart.

    Attributes:
        resources: name → text.
        site: path of the site profile, where it is given.
        dry_run: print the script, and do nothing.
        rest: all other words, in their order.
    """

    resources: dict[str, str]
    site: Path | None
    dry_run: bool
    rest: tuple[str, ...]


def take_apart(words: Sequence[str]) -> Words:
    """Sort a command line into what the cluster is asked for and what the command gets.

    Raises:
        BadInput: a resource has no value, or a word holds a control character.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        check_text("an argument", word)
        name, given, value = word[2:].partition("=") if word.startswith("--") else ("", "", "")
        if name not in (*NAMES, "site", "dry_run"):
            rest.append(word)
        elif given:
            found[name] = value
        elif name in (*_FLAGS, "dry_run"):
            found[name] = "true"
        elif queue and (name == _OPTIONS or not queue[0].startswith("--")):
            found[name] = queue.pop(0)
        else:
            raise BadInput(f"--{name} needs a value")
    site = found.pop("site", None)
    dry_run = found.pop("dry_run", "false") == "true"
    return Words(found, Path(site) if site is not None else None, dry_run, tuple(rest))


def check_known(flags: Iterable[str], command: str, own: Sequence[str]) -> None:
    """Refuse a flag that is neither a resource nor the command's, and name the valid ones.

    Args:
        flags: words such as `--seed` or `--seed=3`.
        command: that they are meant for.
        own: the command's flags, without dashes; those of a configuration's sections need not be there.

    Raises:
        BadInput: there is one.
    """
    for flag in flags:
        name = flag[2:].partition("=")[0]
        if not flag.startswith("--") or not name or "." in name or name in own:
            continue
        close = difflib.get_close_matches(name, [*NAMES, *own], n=1)
        hint = f" (did you mean --{close[0]}?)" if close else ""
        raise BadInput(
            f"unknown parameter --{name}{hint}; valid for the job:"
            f" {', '.join((*NAMES, 'site', 'dry_run'))}; for {command}: {', '.join(own)}"
        )


@dataclass(frozen=True)
class Site:
    """What a cluster's users have in common.

    Attributes:
        resources: for all commands.
        commands: for one of them, by its name.
        setup: lines of shell that the batch script runs first.
        python: program and options that run Python in the job's step.
    """

    resources: dict[str, str] = field(default_factory=dict)
    commands: dict[str, dict[str, str]] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    python: tuple[str, ...] = field(default_factory=python_of_this)

    def layers(self, command: str, environment: Mapping[str, str]) -> list[dict[str, str]]:
        """The defaults of a command's resources, weakest first."""
        shell = {name: environment[key] for key, name in _ENVIRONMENT.items() if environment.get(key)}
        return [self.resources, self.commands.get(command, {}), shell]


def find_site(given: Path | None, environment: Mapping[str, str] = os.environ) -> Site:
    """The profile that is given, or that $AGRIVISION_SITE names, or the user's own, or an empty one.

    Raises:
        BadInput: it cannot be read, or says what it cannot say.
    """
    if given is not None:
        return read_site(given)
    if environment.get("AGRIVISION_SITE"):
        return read_site(Path(environment["AGRIVISION_SITE"]))
    home = Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    own = home / "agrivision" / "site.yaml"
    return read_site(own) if own.is_file() else Site()


def read_site(file: Path) -> Site:
    """Read a site profile.

    Raises:
        BadInput: it cannot be read, says what it cannot say, or is somebody else's, whose lines the
            job's shell would run; the line names the file.
    """
    try:
        # Everything stays text: to YAML 1:30:00 is the number 5400.
        content = yaml.load(read_own(file).decode(), Loader=yaml.BaseLoader)  # noqa: S506  # text only # nosec B506
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the site profile {file}: {error}") from None
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise BadInput(f"the site profile {file} is not valid YAML: {where}") from None
    if not isinstance(content, dict):
        raise BadInput(f"the site profile {file} holds no keys")
    commands = {name: content.pop(name) for name in COMMANDS if name in content}
    setup, python = (_lines(file, name, content.pop(name, [])) for name in ("setup", "python"))
    for name, part in (("", content), *commands.items()):
        _check_part(file, name, part)
    return Site(content, commands, setup, python or python_of_this())


def _lines(file: Path, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise BadInput(f"{file}: {name} must be a list of texts")
    return tuple(value)


def _check_part(file: Path, name: str, part: Any) -> None:
    where = f"{file}, {name}" if name else str(file)
    if not isinstance(part, dict):
        raise BadInput(f"{where}: it must hold keys, such as partition: gpu")
    valid = NAMES if name else (*NAMES, *COMMANDS, "setup", "python")
    for key, value in part.items():
        if key not in valid:
            close = difflib.get_close_matches(key, valid, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise BadInput(f"unknown key {key} in {where}{hint}; valid: {', '.join(valid)}")
        if not isinstance(value, str):
            raise BadInput(f"{where}: {key} must be one value")
    try:
        build(part)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
