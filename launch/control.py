"""`python -m launch cancel` and `resume`: jobs end for good, and go on, by run directory."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from agrivision.console import say
from agrivision.errors import BadInput, ExitCode
from launch import poll, slurm
from launch.find import Found, find, is_done, tasks
from launch.freeze import freeze_code
from launch.jobdir import JobDirectory, JobSpec
from launch.resources import Site, Words, build, check_known, describe, find_site, take_apart
from launch.slurm import QueuedJob
from launch.submit import Setting, alive, check_path, check_ranks, script, submit


def cancel(argv: list[str]) -> ExitCode:
    """`python -m launch cancel`."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m launch cancel",
        description="End jobs for good. A training run saves first; `launch resume` goes on.",
        exit_on_error=False,
    )
    parser.add_argument("paths", type=str, nargs="+", help="runs, jobs, or folders that hold some")
    args = parser.parse_args(argv)
    slurm.require()
    found = _own(find([Path(path) for path in args.paths]))
    known = _ask(found)
    for one in found:
        jobs = _alive(one, known)
        if jobs:
            slurm.cancel([job.id for job in jobs])
            poll.forget()
        for job in jobs:
            say(f"{one.path}: cancelled job {job.id}, which was {job.state}")
        if not jobs:
            say(f"{one.path}: nothing in the queue")
    return ExitCode.DONE


def _own(found: Sequence[Found]) -> list[Found]:
    """Without what is somebody else's: its list of jobs may name any, and its code do anything.

    Raises:
        BadInput: there is nothing else.
    """
    own = []
    for one in found:
        try:
            if one.job is not None:
                one.job.require_own()
            own.append(one)
        except BadInput as refusal:
            if len(found) == 1:
                raise
            say(f"left alone: {refusal}")
    return own


def _ask(found: Sequence[Found]) -> dict[str, QueuedJob]:
    """What Slurm knows now of all jobs of some work, in one question."""
    jobs = {name.partition("_")[0] for one in found if one.job is not None for name in one.job.jobs()}
    return slurm.queue(sorted(jobs))


def _alive(found: Found, known: dict[str, QueuedJob]) -> list[QueuedJob]:
    names = found.job.jobs() if found.job is not None else []
    return [known[name] for name in dict.fromkeys(names) if name in known and alive(known[name])]


def resume(argv: list[str]) -> ExitCode:
    """`python -m launch resume`."""
    if not argv or {"-h", "--help"} & set(argv):
        say(
            "usage: python -m launch resume DIR … [RESOURCES] [--fresh_code] [--site FILE]"
            " [--dry_run]\n\n"
            "Submit again what was interrupted, with the resources of before unless others are given.\n"
            "What was submitted by sbatch needs --nodes and --gpus_per_node or --tasks_per_node.\n"
            "Of a folder that holds several, those that are neither done nor in the queue.\n\n"
            f"{describe()}"
            "  --fresh_code          run the code of today instead of that of the first submission"
        )
        return ExitCode.DONE
    words = take_apart(argv)
    check_known(words.rest, "resume", ["fresh_code"])
    paths = [Path(word) for word in words.rest if not word.startswith("--")]
    if not paths:
        raise BadInput("resume needs a run directory")
    if "parts" in words.resources:
        raise BadInput("resume does not divide anew: give the command again, with other --parts")
    slurm.require()
    site = find_site(words.site)
    found = _own(find(paths))
    known = _ask(found)
    for one in found:
        refusal = _refusal(one, known) or _unknown_ranks(one, words, site)
        if refusal and len(found) == 1:
            raise BadInput(refusal)
        if refusal:
            say(refusal)
        elif one.job is not None:
            _resume(one.path, one.job, words, site)
    return ExitCode.DONE


def _refusal(found: Found, known: dict[str, QueuedJob]) -> str:
    """Why some work is not submitted again; empty where it is."""
    if found.job is None:
        return f"{found.path} was never launched: use `python -m launch train --run_dir {found.path}`"
    for job in _alive(found, known):
        return f"{found.path}: job {job.id} is {job.state}; `python -m launch cancel` ends it"
    if is_done(found.job):
        return f"{found.path} is done"
    if tasks(found.job)[0].task is not None:
        return f"{found.path} was made by a job array: submit it as before; what is done stays"
    return ""


def _unknown_ranks(found: Found, words: Words, site: Site) -> str:
    """A plain sbatch leaves no note of what it asked for, and one rank would silently take over."""
    if found.job is None or found.job.spec().resources:
        return ""
    given = words.resources.keys() | _defaults(found.job.spec(), site).keys()
    if "nodes" in given and given & {"gpus_per_node", "tasks_per_node"}:
        return ""
    last = next(reversed(found.job.attempts()), None)
    had = f" (it had {last.tasks} ranks on {len(last.nodes)} nodes)" if last is not None else ""
    return (
        f"{found.path} was submitted by sbatch{had}: say --nodes, and --gpus_per_node or"
        " --tasks_per_node, or submit the script again"
    )


def _resume(out: Path, job: JobDirectory, words: Words, site: Site) -> None:
    spec = job.spec()
    setting = _setting(spec, words, site)
    check_path(job.path)
    if words.dry_run:
        say(script(job.path, job.code, out.name, setting).rstrip("\n"))
        return
    if "--fresh_code" in words.rest:
        freeze_code(job, again=True)
    job.write_spec(_renewed(spec, job, setting))
    number = submit(job, setting, name=out.name, by="resume")
    say(f"{out}: job {number}")
    for dependent in spec.dependents:
        try:
            slurm.update(dependent, Dependency=f"afterok:{number}")
        except slurm.SlurmError as error:
            say(f"job {dependent} does not wait for it: {error}")


def _defaults(spec: JobSpec, site: Site) -> dict[str, str]:
    """What a site asks for where nothing else is said; what is one job does not become an array."""
    merged: dict[str, str] = {}
    for layer in site.layers(spec.command[0], os.environ):
        merged |= layer
    return {name: value for name, value in merged.items() if name != "parts"}


def _setting(spec: JobSpec, words: Words, site: Site) -> Setting:
    """As before, but for what the command line says; a profile that it names brings all of its own."""
    before = dict(spec.resources)
    setup = tuple(before.pop("setup", ()))
    if not before:  # a plain sbatch, whose flags nobody has noted
        before = {"max_attempts": spec.max_attempts}
        before |= {"signal_seconds": spec.signal_seconds} if spec.signal_seconds else {}
        before |= {"srun_args": shlex.join(spec.srun)} if spec.srun else {}
        setup = site.setup
    resources = build(_defaults(spec, site), before, words.resources)
    resources = check_ranks(spec.command[0], resources)
    named = words.site is not None
    return Setting(
        resources=resources,
        setup=site.setup if named else setup,
        python=site.python if named else spec.python,
    )


def _renewed(spec: JobSpec, job: JobDirectory, setting: Setting) -> JobSpec:
    resources = setting.resources
    return dataclasses.replace(
        spec,
        python=setting.python,
        srun=tuple(shlex.split(resources.srun_args or "")),
        max_attempts=setting.attempts(job),
        signal_seconds=resources.signal_seconds,
        resources=setting.noted(),
    )
