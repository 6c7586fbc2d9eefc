"""`python -m launch sweep`: all combinations of some values as one job array, and their results.

DIR/000-optimizer.lr=1e-3,model.depth=3/    a run directory for each
DIR/launch/                                 what was swept, the code, the logs
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agrivision.console import say
from agrivision.errors import BadInput, ExitCode
from agrivision.storage import write_atomically
from launch.find import Found
from launch.freeze import freeze_code, freeze_train
from launch.jobdir import JobDirectory
from launch.resources import build, check_text, describe, find_site, take_apart
from launch.status import Report, number, report
from launch.submit import (
    Setting,
    check_path,
    check_ranks,
    locate,
    make_folder,
    refuse_if_queued,
    script,
    specify,
    submit_array,
    warn_of_data,
)

_USAGE = """\
usage: python -m launch sweep --out DIR --config FILE --section.key V1,V2 … [RESOURCES]
                              [--array_parallelism N] [--table FILE] [--site FILE] [--dry_run]

Train with all combinations of the values as one job array. Values are separated by commas, or written
as a YAML list: --optimizer.lr 1e-3,3e-3 and --optimizer.lr '[1e-3, 3e-3]' are the same. Given again
with the same DIR, it prints the results.

  --out DIR             folder of the sweep; each element gets a run directory in it
  --array_parallelism N so many elements at a time (default: all)
  --table FILE          write the results as FILE.csv or FILE.json
"""
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Element:
    """One combination.

    Attributes:
        name: of its run directory.
        values: by key, as on the command line.
    """

    name: str
    values: dict[str, str]


def main(argv: list[str]) -> ExitCode:
    """`python -m launch sweep`."""
    if not argv or {"-h", "--help"} & set(argv):
        say(f"{_USAGE}\n{describe()}".rstrip("\n"))
        return ExitCode.DONE
    words = take_apart(argv)
    own, rest = _own(words.rest)
    if "out" not in own:
        raise BadInput("sweep needs --out: the folder for its runs")
    out = Path(os.path.abspath(own["out"]))  # noqa: PTH100 - follows no links
    known = _read(out)
    if known is not None:
        fixed, keys = take_values(rest)
        if rest and [fixed, keys] != [known["fixed"], known["keys"]]:
            raise BadInput(f"{out} holds another sweep: choose another --out")
        _tell(out, _elements(known["keys"]), own.get("table"))
        return ExitCode.DONE
    fixed, keys = take_values(rest)
    elements = _elements(keys)
    if not keys:
        raise BadInput("nothing is swept: give a key several values, such as --optimizer.lr 1e-3,3e-3")
    site = find_site(words.site)
    resources = build(*site.layers("train", os.environ), words.resources)
    setting = Setting.of(check_ranks("train", resources), site)
    parallel = _parallel(own.get("array_parallelism"), len(elements))
    calls = [_arguments(out, element, fixed) for element in elements]
    for call in calls:
        locate("train", call)
    warn_of_data(calls)
    folder = JobDirectory.of_run(out)
    if words.dry_run:
        array = f"0-{len(calls) - 1}%{parallel}"
        sys.stdout.write(script(folder.path, folder.code, out.name, setting, array=array))
        return ExitCode.DONE
    numbers = _submit(out, calls, setting, parallel)
    _write(out, fixed, keys)
    say(f"jobs {numbers[0]} … {numbers[-1]}, in {out}")
    return ExitCode.DONE


def _own(rest: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The sweep's own flags, and what is left."""
    own: dict[str, str] = {}
    left: list[str] = []
    queue = list(rest)
    while queue:
        word = queue.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        if name == "run_dir":
            raise BadInput("a sweep makes run directories of its own: give --out instead of --run_dir")
        if not word.startswith("--") or name not in ("out", "array_parallelism", "table"):
            left.append(word)
        elif given or queue:
            own[name] = value if given else queue.pop(0)
        else:
            raise BadInput(f"--{name} needs a value")
    return own, left


def _parallel(text: str | None, count: int) -> int:
    if text is None:
        return count
    if not text.isdigit() or int(text) < 1:
        raise BadInput(f"--array_parallelism is {text!r}: it must be a number of at least 1")
    return min(int(text), count)


def take_values(rest: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Tell the keys with several values from the arguments that all elements share.

    Args:
        rest: arguments of `agrivision train`.

    Returns:
        The shared arguments, and the values by key.

    Raises:
        BadInput: values that cannot be read.
    """
    fixed: list[str] = []
    keys: dict[str, list[str]] = {}
    queue = list(rest)
    while queue:
        word = queue.pop(0)
        key, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or key == "config" or not (given or queue):
            fixed.append(word)
            continue
        if not given and queue[0].startswith("--"):  # a flag without a value
            fixed.append(word)
            continue
        value = value if given else queue.pop(0)
        values = split_values(key, value)
        if len(values) > 1:
            keys[key] = values
        else:
            fixed += [f"--{key}", *values]
    return fixed, keys


def split_values(key: str, text: str) -> list[str]:
    """`1,2` or `[1, 2]` as YAML reads a list; its entries stay as they are written.

    Raises:
        BadInput: it is no list of single values, or two of them are the same.
    """
    listed = text.strip().startswith("[")
    if not listed and "," not in text:
        return [text]
    try:
        values = yaml.load(text if listed else f"[{text}]", Loader=yaml.BaseLoader)  # noqa: S506  # text only # nosec B506
    except yaml.YAMLError:
        raise BadInput(f"--{key} is {text!r}: write several values as 1,2 or as a YAML list") from None
    if (
        not isinstance(values, list)
        or not all(isinstance(value, str) for value in values)
        or not values
    ):
        raise BadInput(f"--{key} is {text!r}: each of its values must be a single one")
    if len(set(values)) < len(values):
        raise BadInput(f"--{key} is {text!r}: a value stands there twice")
    for value in values:
        check_text(f"a value of --{key}", value)
    return list(values)


def _elements(keys: Mapping[str, Sequence[str]]) -> list[Element]:
    """All combinations, the last key changing fastest."""
    combinations = itertools.product(*keys.values())
    return [
        Element(_name(place, values), values)
        for place, values in enumerate(dict(zip(keys, one, strict=True)) for one in combinations)
    ]


def _name(place: int, values: Mapping[str, str]) -> str:
    """`003-optimizer.lr=1e-3`: unique by its number, readable by the rest."""
    text = ",".join(f"{key}={value}" for key, value in values.items())
    return f"{place:03d}-{re.sub(r'[^A-Za-z0-9._=,+-]', '_', text)}"[:_LONGEST_NAME]


def _arguments(out: Path, element: Element, fixed: Sequence[str]) -> list[str]:
    own = [word for key, value in element.values.items() for word in (f"--{key}", value)]
    return [*fixed, *own, "--run_dir", str(out / element.name)]


def _submit(out: Path, calls: Sequence[Sequence[str]], setting: Setting, parallel: int) -> list[str]:
    """Freeze every element and submit all of them together."""
    folder = JobDirectory.of_run(out)
    check_path(folder.path)
    refuse_if_queued(folder)
    make_folder(out)
    folder.make()
    freeze_code(folder, again=True)
    jobs = []
    for call in calls:
        job, run_dir, command = freeze_train(call)
        if not job.code.is_symlink():
            job.code.symlink_to(Path("..", "..", "launch", "code"))
        spec = specify(job, setting, command=command, run_dir=str(run_dir), cwd=str(Path.cwd()))
        job.write_spec(spec)
        jobs.append(job)
    return submit_array(folder.path, jobs, setting, name=out.name, parallel=parallel)


def _write(out: Path, fixed: Sequence[str], keys: Mapping[str, Sequence[str]]) -> None:
    content = {"fixed": list(fixed), "keys": {key: list(values) for key, values in keys.items()}}
    file = JobDirectory.of_run(out).path / "sweep.json"
    write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())


def _read(out: Path) -> dict[str, Any] | None:
    """What was swept in a folder; None where nothing was."""
    file = JobDirectory.of_run(out).path / "sweep.json"
    try:
        content = json.loads(file.read_bytes())
        return {"fixed": list(content["fixed"]), "keys": dict(content["keys"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot read {file}: {error}") from None


def _tell(out: Path, elements: Sequence[Element], file: str | None) -> None:
    found = report([Found(out / one.name, JobDirectory.of_run(out / one.name)) for one in elements])
    results = list(table(elements, found))
    if file is not None:
        _save(Path(file), results)
    if sys.stdout.isatty():
        shown = Table(box=None, pad_edge=False)
        for name in results[0]:
            shown.add_column(name, overflow="fold")
        for row in results:
            shown.add_row(*(Text(_cell(value)) for value in row.values()))
        Console().print(shown)
    else:
        for row in results:
            say(", ".join(f"{name} {_cell(value)}" for name, value in row.items() if value is not None))
    if found.note:
        say(found.note)


def table(elements: Sequence[Element], found: Report) -> Iterable[dict[str, Any]]:
    """The results: element, its values, state, best mIoU, where that was, steps."""
    for element, row in zip(elements, found.rows, strict=True):
        yield {
            "element": element.name.partition("-")[0],
            **element.values,
            "state": row.state,
            "best mIoU": row.best_miou,
            "at step": row.best_step,
            "step": row.step,
            "of": row.total_steps,
        }


def _cell(value: Any) -> str:
    return number(value, 4) if isinstance(value, float) else "" if value is None else str(value)


def _save(file: Path, results: Sequence[Mapping[str, Any]]) -> None:
    if file.suffix == ".json":
        write_atomically(file, (json.dumps(list(results), indent=2) + "\n").encode())
    elif file.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(results[0]))
        writer.writeheader()
        writer.writerows(results)
        write_atomically(file, text.getvalue().encode())
    else:
        raise BadInput(f"--table is {str(file)!r}: its name must end in .csv or .json")
