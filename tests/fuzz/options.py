"""Configuration from YAML and the command line: right values, or one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import typing
from pathlib import Path
from typing import Any

import yaml

from agrivision import options as module
from agrivision.config import Config, flatten
from tests.fuzz.harness import REFUSED, Target, answer
from tests.fuzz.mutations import Program, change_bytes, mutate_tree

_KINDS = {int: int, float: (int, float), bool: bool, str: str}
_BOMB = b"""
data: &a {path: &b [x, x, x, x, x, x, x, x, x, x]}
model: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]
loss: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]
optimizer: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]
schedule: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e, *e]
training: {<<: *a, epochs: [*f, *f, *f, *f, *f, *f, *f, *f, *f, *f]}
"""
_SHARED = b"""
seed: &seed 3
data: {path: fields, batch_size: 4, crop: null, threads: *seed}
optimizer: {lr: 1e-3, name: sgd}
"""


def _parser_once() -> None:
    """Making the parser takes ten times as long as parsing."""
    if hasattr(module.train_parser, "made"):
        return
    made = module.train_parser()

    def train_parser() -> Any:
        # Where --print_config stood beside something wrong, the parser would answer it the next time.
        vars(made).pop("print_config", None)
        return made

    train_parser.made = made  # type: ignore[attr-defined]
    module.train_parser = train_parser


def _mutate(seeds: Any, program: bytes) -> bytes:
    """YAML as text, or as a tree: JSON is YAML."""
    steps = Program(program)
    if steps.number(2):
        return mutate_tree(steps.choice(seeds[:2]), steps)
    content = bytearray(steps.choice(seeds[2:]))
    change_bytes(content, seeds, steps)
    return bytes(content)


def config_file(folder: Path) -> Target:
    """A YAML file."""
    _parser_once()
    path = folder / "config.yaml"
    whole = Config().to_dict()
    some = {"seed": 3, "data": {"path": "x", "crop": 5}, "optimizer": {"lr": 0.1, "clip_norm": None}}
    plain = yaml.safe_dump(whole).encode()
    seeds = (json.dumps(some).encode(), json.dumps(whole).encode(), plain, _SHARED, _BOMB)
    seeds += (
        b"seed: 1\nseed: 2\n",
        b"data: " + b"[" * 3000,
        b"seed: !!python/object/apply:os.getpid []\n",
    )
    seeds += (b"data:\n  path: a\ndata:\n  path: b\n",)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        config = answer(lambda: module.read_config(path))
        if config is not REFUSED:
            check(config)
            expected = Config().to_dict()
            _overlay(expected, yaml.safe_load(data))
            assert _same(flatten(config.to_dict()), flatten(expected))
            path.write_text(module.to_yaml(config.to_dict()))
            assert module.read_config(path) == config

    return Target(seeds=seeds, run=run, mutate=_mutate)


def _overlay(tree: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict):
            _overlay(tree[key], value)
        else:
            tree[key] = value


def _same(config: dict[str, Any], said: dict[str, Any]) -> bool:
    """Whether the values are those of the file, numbers that YAML 1.1 takes for text included."""
    for key, value in config.items():
        other = said[key]
        if isinstance(value, float) and type(other) is int:
            other = float(other)  # as large ones are rounded
        if isinstance(value, int | float) and isinstance(other, str):
            other = float(other) if isinstance(value, float) else int(other)
        if isinstance(value, str) and not isinstance(other, str):
            continue  # `path: 2024-01-01` is a date in YAML and a folder here
        if value != other:
            return False
    return config.keys() == said.keys()


def check(config: Config) -> None:
    """Every value has the type that its key is declared with."""
    for section in dataclasses.fields(Config):
        value = getattr(config, section.name)
        if not dataclasses.is_dataclass(value):
            assert type(value) is int
            continue
        hints = typing.get_type_hints(type(value))
        for entry in dataclasses.fields(value):
            assert _fits(getattr(value, entry.name), hints[entry.name]), entry.name


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_args(kind):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if kind is type(None):
        return value is None
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return False
    return isinstance(value, _KINDS[kind])


def command_line(folder: Path) -> Target:
    """What follows `agrivision train`: arguments, one a line."""
    _parser_once()
    path = folder / "config.yaml"
    path.write_text("seed: 3\n")
    lines = [
        ["--run_dir", "run", "--optimizer.lr", "1e-3", "--data.crop", "null", "--seed=4"],
        ["--run_dir=run", "--config", "CONFIG", "--model.depth", "3", "--training.deterministic=false"],
        ["--run_dir", "run", "--data", '{"path": "x", "batch_size": 3}', "--data.stage", "auto"],
        [
            "--run_dir",
            "run",
            "--config=CONFIG",
            "--config",
            "CONFIG",
            "--profile",
            "--resume_with_changes",
        ],
        ["--run_dir", "run", "--help"],
        ["--run_dir", "run", "--print_config", "--optimizer", "CONFIG", "--", "x"],
    ]
    seeds = tuple("\n".join(line).encode() for line in lines)

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape").replace("CONFIG", str(path))
        shown = io.StringIO()
        try:
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                found = answer(lambda: module.parse_train(text.split("\n")))
        except SystemExit as leaving:  # --help and --print_config
            if leaving.code or not shown.getvalue():
                raise
            return
        if found is not REFUSED:
            check(found.config)

    return Target(seeds=seeds, run=run)
