"""Every command on the site is one that there is, with options that there are, and is run somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from argparse import ArgumentError
from collections.abc import Sequence

import pytest

from agrivision.cli import _COMMANDS
from agrivision.errors import AgrivisionError
from agrivision.options import parse_train
from launch.__main__ import _COMMANDS as LAUNCH
from launch.resources import build, take_apart
from tests.docs.pages import ROOT, Block, every_block, sources
from tests.docs.test_commands import PAGES

# Programs that are not ours; `exec` and the like would hide another.
FOREIGN = {".", "pip", "python3", "tar"}
OURS = {"agrivision", "python", "make", "sbatch", "torchrun", "timeout"}
STOPS = {"|", "||", "&&", ";", ">", "&"}
SHELL = [block for block in every_block() if block.language == "sh"]
SUBMITTED = {"train", "prepare", "evaluate", "predict"}
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(block: Block) -> list[list[str]]:
    """The words of each line's first command, without what is set for it."""
    found = []
    for line in block.lines:
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        end = next((place for place, word in enumerate(words) if word in STOPS), len(words))
        found.append(words[:end])
    return found


def check(words: Sequence[str]) -> None:
    """Refuse a command that there is not, or one with options that there are not."""
    program, rest = words[0], list(words[1:])
    if program == "timeout":
        check(rest[2:])  # --preserve-status SECONDS
    elif program == "torchrun":
        check(rest[rest.index("-m") + 1 :])
    elif program == "python" and rest[:2] == ["-m", "agrivision"]:
        check(rest[1:])
    elif program == "python" and rest[:2] == ["-m", "launch"]:
        check_launch(rest[2], rest[3:])
    elif program == "python":
        assert rest[0] == "-m" and importlib.util.find_spec(rest[1]) is not None, rest
    elif program == "agrivision":
        check_agrivision(rest[0], rest[1:])
    elif program == "sbatch":
        check_sbatch(rest)
    elif program == "make":
        assert {word for word in rest if "=" not in word} <= TARGETS, rest
    else:
        assert program in FOREIGN, f"what is {program!r}?"


def check_agrivision(name: str, words: list[str]) -> None:
    if name == "train":
        words = words if "--run_dir" in words else [*words, "--run_dir", "run"]
        parse_train([word for word in words if word != "--print_config"])
    else:
        _COMMANDS[name].parser().parse_args(words)


def check_launch(name: str, words: list[str]) -> None:
    assert name in LAUNCH
    if name in SUBMITTED:
        taken = take_apart(words)
        build(taken.resources)
        check_agrivision(name, list(taken.rest))


def check_sbatch(words: list[str]) -> None:
    place = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
    script = ROOT / words[place]
    assert script.is_file(), script
    if script.stem in SUBMITTED and words[place + 1 :]:
        check_agrivision(script.stem, words[place + 1 :])


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_its_commands_exist(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(block):
        check(words)


def test_a_command_that_there_is_not_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in [
        "agrivision prepare source out --tyle 512",
        "agrivision trane",
        "agrivision train --config configs/none.yaml --run_dir run",
        "agrivision train --run_dir run --optimizer.rate 1",
        "sbatch slurm/training.sbatch",
        "sbatch --nodes=2 slurm/predict.sbatch --checkpoint run scene.tif",
        "python -m launch train --knots 2 --run_dir run",
        "torchrun --nproc_per_node=2 -m agrivision score",
        "python -m benchmarks.nothing",
        "make everything",
        "frobnicate",
    ]:
        with pytest.raises((AssertionError, AgrivisionError, ArgumentError, KeyError)):
            check(shlex.split(line))


def test_blocks_say_what_they_are() -> None:
    for block in every_block():
        if block.language in ("sh", "python"):
            assert "…" not in block.text, f"{block}: who copies it gets an error"
        else:
            words = {line.split()[0] for line in block.lines if line.split()}
            assert not words & (OURS | FOREIGN), f"{block} holds commands: say ```sh"


def test_every_page_with_commands_is_run() -> None:
    wanted = {
        block.page
        for block in every_block()
        if block.language in ("sh", "python") and block.mark != "not run"
    }
    assert wanted == {*PAGES, "docs/library.md"}  # the library has tests/test_documentation.py


def test_what_is_not_run_says_why() -> None:
    """No other block is left out, and the reasons are few."""
    skipped = [str(block) for block in every_block() if block.mark == "not run"]
    for page in sources():
        text = (ROOT / page).read_text()
        said = len(re.findall(r"^<!-- not run", text, re.MULTILINE))
        assert said == sum(name.startswith(f"{page}:") for name in skipped), page
