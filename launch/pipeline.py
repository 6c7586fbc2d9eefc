"""`python -m launch pipeline`: prepare → train → evaluate → predict, each after the one it needs.

DIR/dataset  DIR/run  DIR/score.json  DIR/maps
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agrivision.console import say
from agrivision.data.schema import FILE_NAME
from agrivision.errors import BadInput, ExitCode
from launch.find import is_done
from launch.jobdir import JobDirectory
from launch.resources import NAMES, Site, build, describe, find_site, take_apart
from launch.submit import (
    Setting,
    check_ranks,
    freeze,
    locate,
    make_folder,
    refuse_if_queued,
    script,
    submit,
)

_USAGE = """\
usage: python -m launch pipeline --source S --out DIR --config FILE [--section.key value …] [RESOURCES]
                                 [--STAGE.RESOURCE value …] [--STAGE.OPTION value …]
                                 [--predict PATH …] [--site FILE] [--dry_run]

Prepare S, train on it, score the run and predict, each job after the one that it needs. What is there
already is left out. STAGE is prepare, train, evaluate or predict; an option is one of its command.

  --source S            what `agrivision prepare` reads
  --out DIR             gets dataset, run, score.json and maps
  --predict PATH …      what to predict; default: the data set's validation split
"""
_STAGES = ("prepare", "train", "evaluate", "predict")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job of a pipeline.

    Attributes:
        command: of agrivision.
        arguments: that follow it.
        needs: commands of the stages that it waits for.
        done: its result is there.
        setting: how it is submitted.
    """

    command: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    done: bool
    setting: Setting


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        source: what is prepared.
        out: folder for everything.
        predict: what is predicted; empty: the validation split.
        train: arguments of `agrivision train`.
        resources: by command.
        options: further arguments, by command.
    """

    source: str
    out: Path
    predict: tuple[str, ...]
    train: tuple[str, ...]
    resources: dict[str, dict[str, str]]
    options: dict[str, list[str]]


def main(argv: list[str]) -> ExitCode:
    """`python -m launch pipeline`."""
    if not argv or {"-h", "--help"} & set(argv):
        say(f"{_USAGE}\n{describe()}".rstrip("\n"))
        return ExitCode.DONE
    words = take_apart(argv)
    request = read_request(words.rest)
    stages = plan(request, find_site(words.site), words.resources)
    waiting = [stage for stage in stages if not stage.done]
    # What a stage before makes is not there yet.
    places = {
        stage.command: locate(
            stage.command,
            stage.arguments,
            inputs=stage.command == "prepare",
            parts=stage.setting.resources.parts,
        )
        for stage in waiting
    }
    if words.dry_run:
        for stage in waiting:
            _show(stage, places)
        return ExitCode.DONE
    for place in places.values():
        refuse_if_queued(place)
    make_folder(request.out)
    for stage in stages:
        if stage.done:
            say(f"{stage.command}: there already")
    submit_all(waiting, places)
    return ExitCode.DONE


def read_request(rest: Sequence[str]) -> Request:
    """Read what is left of the command line when the common resources are taken out.

    Raises:
        BadInput: something is missing, or twice.
    """
    own: dict[str, str] = {}
    inputs: list[str] = []
    train: list[str] = []
    resources: dict[str, dict[str, str]] = {command: {} for command in _STAGES}
    options: dict[str, list[str]] = {command: [] for command in _STAGES}
    queue = list(rest)
    while queue:
        word = queue.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        values = [value] if given else []
        while not given and queue and not queue[0].startswith("--"):
            values.append(queue.pop(0))
        stage, _, key = name.partition(".")
        if name in ("source", "out"):
            if len(values) != 1:
                raise BadInput(f"--{name} needs one value")
            own[name] = values[0]
        elif name == "predict":
            inputs += values
        elif name == "run_dir":
            raise BadInput("a pipeline's run directory is DIR/run: give --out DIR instead of --run_dir")
        elif key and stage in _STAGES and key in NAMES:
            resources[stage][key] = values[0] if values else "true"
        elif key and stage in _STAGES:
            options[stage] += [f"--{key}", *values]
        else:
            train += [word, *([] if given else values)]
    for name in ("source", "out"):
        if name not in own:
            raise BadInput(f"pipeline needs --{name}")
    out = Path(os.path.abspath(own["out"]))  # noqa: PTH100 - follows no links
    return Request(own["source"], out, tuple(inputs), tuple(train), resources, options)


def plan(request: Request, site: Site, resources: dict[str, str]) -> list[Stage]:
    """The four stages, whether they have to run or not.

    Args:
        request: what is wanted.
        site: defaults.
        resources: for all stages.

    Raises:
        BadInput: a resource is wrong.
    """
    out = request.out
    dataset, run, score, maps = (str(out / name) for name in ("dataset", "run", "score.json", "maps"))
    inputs = list(request.predict) or [dataset, "--split", "val"]
    arguments = {
        "prepare": [request.source, dataset],
        "train": [*request.train, "--data.path", dataset, "--run_dir", run],
        "evaluate": ["--checkpoint", run, "--data", dataset, "--json", score],
        "predict": ["--checkpoint", run, *inputs, "--out", maps],
    }
    needs = {"prepare": (), "train": ("prepare",), "evaluate": ("train",), "predict": ("train",)}
    done = {
        "prepare": (out / "dataset" / FILE_NAME).is_file(),
        "train": is_done(JobDirectory.of_run(out / "run")),
        "evaluate": (out / "score.json").is_file(),
        "predict": is_done(JobDirectory.beside(out / "maps")),
    }
    stages = []
    for command in _STAGES:
        own = build(*site.layers(command, os.environ), resources, request.resources[command])
        setting = Setting.of(check_ranks(command, own), site)
        words = (*arguments[command], *request.options[command])
        stages.append(
            Stage(
                command=command,
                arguments=words,
                needs=needs[command],
                done=done[command],
                setting=setting,
            )
        )
    return stages


def _show(stage: Stage, places: dict[str, JobDirectory]) -> None:
    """Print a stage's script, with a name instead of the id of a job that it would wait for."""
    before = [f"JOB_OF_{command.upper()}" for command in stage.needs if command in places]
    job = places[stage.command]
    sys.stdout.write(
        script(job.path, job.code, stage.command, stage.setting.waiting_for(before)) + "\n"
    )


def submit_all(stages: Sequence[Stage], places: dict[str, JobDirectory]) -> None:
    """Submit stages in their order, each to wait for those that it needs.

    Args:
        stages: that have to run.
        places: their job directories.

    Raises:
        BadInput, SlurmError, StorageError: as `freeze` and `submit` do.
    """
    numbers: dict[str, str] = {}
    for stage in stages:
        before = [command for command in stage.needs if command in numbers]
        setting = stage.setting.waiting_for([numbers[command] for command in before])
        job = places[stage.command]
        freeze(job, stage.command, stage.arguments, setting)
        number = submit(job, setting, name=stage.command, by="launch")
        numbers[stage.command] = number
        for command in before:
            _depends(places[command], number)
        after = f", after {' and '.join(before)}" if before else ""
        say(f"{stage.command}: job {number}{after}, in {job.path}")


def _depends(job: JobDirectory, dependent: str) -> None:
    """Note a waiting job where the one that it waits for looks when a successor takes its place."""
    if not job.spec_file.is_file():  # an array: the successor of one task does not stand for the others
        return
    spec = job.spec()
    job.write_spec(dataclasses.replace(spec, dependents=(*spec.dependents, dependent)))
