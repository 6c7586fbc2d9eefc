"""Configuration from YAML files and the command line, with errors that fit on one line.

jsonargparse does the work; this module looks at the keys first, so that a misspelt one is answered
with the valid ones, and shortens what jsonargparse says of values.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import types
import typing
from argparse import ArgumentError
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from agrivision.config import Config, flatten
from agrivision.errors import BadInput, ConfigurationError, without_passwords
from agrivision.reading import read_plain

_KEYS = flatten(Config().to_dict())
_MOST_BYTES = 1 << 16  # of a configuration; all of its keys take some 3 kB
_TOO_LARGE = 2**63
_EXPONENT = re.compile(r"[-+]?[\d_.]+[eE][-+]?\d+")
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # deep nesting costs the other one seconds
_DEEPEST = 8  # levels; a configuration has two
_SECTIONS = {key.partition(".")[0] for key in _KEYS if "." in key}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_OTHERS = {"config", "print_config", "help"}


def train_parser() -> jsonargparse.ArgumentParser:
    """Parser of `agrivision train`: the configuration, and where the run goes."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="agrivision train",
        description="Train, or go on with a run that was interrupted. --section.key value overrides"
        " the YAML file.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with the configuration")
    parser.add_argument("--run_dir", type=str, required=True, help="folder of the run")
    parser.add_argument(
        "--resume_with_changes",
        action="store_true",
        help="go on although the configuration or the data set differs from the run's",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of a few steps of this attempt into RUN_DIR/profile",
    )
    parser.add_class_arguments(Config, nested_key=None)
    return parser


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What the command line of `agrivision train` says.

    Attributes:
        config: of the run.
        run_dir: its folder.
        resume_with_changes: go on although something differs.
        profile: write a trace of a few steps.
    """

    config: Config
    run_dir: Path
    resume_with_changes: bool
    profile: bool


def parse_train(argv: Sequence[str]) -> TrainOptions:
    """Parse the arguments after `agrivision train`.

    Without --config, a run directory that has a configuration already lends its own.

    Raises:
        ConfigurationError: a key or value is wrong; the line names it.
        BadInput: another argument is wrong.
    """
    arguments = list(argv)
    _check_words(arguments)
    own = {"--run_dir", "--resume_with_changes", "--profile"}
    _check_flags(arguments, own)
    file, run_dir = _value_of(arguments, "--config"), _value_of(arguments, "--run_dir")
    if file is None and run_dir is not None:
        mine = Path(run_dir) / "config.yaml"
        if mine.is_file():
            file = str(mine)
            arguments = ["--config", file, *arguments]
    for given in _values_of(arguments, "--config"):
        _check_file(Path(given))
    parser = train_parser()
    try:
        parsed = parser.parse_args(arguments)
        values = flatten(parsed.as_dict())
        _check_values(values)
        refuse_passwords([value for value in values.values() if isinstance(value, str)])
        built = parser.instantiate(parsed)
    except ArgumentError as error:
        raise shortened(error) from None
    except OverflowError:  # an integer of hundreds of digits where a number belongs
        raise ConfigurationError("a number on the command line is too large") from None
    fields = {field.name: getattr(built, field.name) for field in dataclasses.fields(Config)}
    return TrainOptions(Config(**fields), Path(built.run_dir), built.resume_with_changes, built.profile)


def read_config(file: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, as `agrivision train --config FILE` takes it.

    Args:
        file: YAML.
        overrides: as on the command line: `["--optimizer.lr", "1e-3"]`.

    Raises:
        ConfigurationError: a key or value is wrong; the line names it.
    """
    return parse_train(["--config", str(file), "--run_dir", ".", *overrides]).config


class _Dumper(yaml.SafeDumper):
    """Quotes what PyYAML takes for text and jsonargparse for a number, as a folder called 1e3."""


def _represent(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = "'" if _EXPONENT.fullmatch(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _represent)


def to_yaml(tree: Mapping[str, Any]) -> str:
    """A configuration as `read_config` takes it again.

    Args:
        tree: of `Config.to_dict`.
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def refuse_passwords(words: Sequence[str]) -> None:
    """Refuse arguments with a password in a URL: they would be written into logs and configurations.

    Raises:
        BadInput: there is one; the line does not repeat it.
    """
    for word in words:
        if without_passwords(word) != word:
            raise BadInput(f"{without_passwords(word)!r} is a URL with a password: only files are read")


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    return next(iter(_values_of(arguments, flag)), None)


def _values_of(arguments: Sequence[str], flag: str) -> list[str]:
    values = []
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            values.append(arguments[place + 1])
        elif argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
    return values


def _check_words(arguments: Sequence[str]) -> None:
    """Refuse what no file's name and no value can hold: a zero, or bytes that are no UTF-8."""
    for argument in arguments:
        if "\0" in argument or not _is_utf8(argument):
            raise BadInput(f"the argument {argument!r} is not plain text")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_flags(arguments: Sequence[str], own: set[str]) -> None:
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            key = argument[2:].partition("=")[0]
            if key in _SECTIONS:  # jsonargparse would read another file, at which nobody has looked
                first = next(name for name in _KEYS if name.startswith(f"{key}."))
                raise BadInput(f"--{key} is a section: give its keys, as --{first}")
            known = key in _KEYS or key in _OTHERS or f"--{key}" in own
            if not known:
                raise _unknown(key, "on the command line", own)


def _check_file(path: Path) -> None:
    try:
        content = _load(path)
    except FileNotFoundError:
        raise ConfigurationError(f"there is no configuration file {path}") from None
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:  # a date that is none is a ValueError
        where = " ".join(str(error).split())
        raise ConfigurationError(f"the configuration {path} is not valid YAML: {where}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"the configuration {path} holds no keys")
    for key, value in flatten({str(key): value for key, value in content.items()}).items():
        if key in _SECTIONS:
            raise ConfigurationError(f"{path}: {key} is a section: it holds keys, not a value")
        if key not in _KEYS:
            raise _unknown(key, f"in {path}")
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            raise ConfigurationError(f"{path}: {key} is too large a number")


def _load(path: Path) -> Any:
    """What a YAML file holds, looked at before anything is made of it.

    Raises:
        OSError: it cannot be read.
        ValueError, YAMLError: it is no YAML of a configuration: larger, deeper, a key that stands
            twice, or an alias of more than a single value, with which a few lines can stand for
            billions.
    """
    try:
        # The parser would take UTF-16 as well, and jsonargparse, which reads the file again, not.
        content = read_plain(path, _MOST_BYTES).decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text: save it as that") from None
    depth, values = 0, set()
    for event in yaml.parse(content, _FAST):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
        if isinstance(event, yaml.ScalarEvent) and event.anchor:
            values.add(event.anchor)
        if isinstance(event, yaml.AliasEvent) and event.anchor not in values:
            raise ValueError(f"*{event.anchor} stands for more than a value: write it out")
    loader = _FAST(content)  # jsonargparse reads with the same one
    try:
        node = loader.get_single_node()
        _check_keys(node)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node | None) -> None:
    """Refuse a key that stands twice: YAML would take the later value in silence."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key, times in Counter(keys).items() if times > 1]
        if len(keys) < len(node.value) or twice:
            raise ValueError(f"the key {twice[0]} stands twice" if twice else "a key is no word")
        for _, value in node.value:
            _check_keys(value)


def _unknown(key: str, where: str, own: Collection[str] = ()) -> ConfigurationError:
    section, dot, _ = key.partition(".")
    if dot and section in _SECTIONS:
        valid = [name for name in _KEYS if name.startswith(f"{section}.")]
    else:
        valid = sorted({name.partition(".")[0] for name in _KEYS})
    names = [*_KEYS, *(flag.removeprefix("--") for flag in own)]
    close = difflib.get_close_matches(key.replace("-", "_"), names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return ConfigurationError(f"unknown key {key} {where}{hint}; valid: {', '.join(valid)}")


def _check_values(values: Mapping[str, Any]) -> None:
    """Refuse what jsonargparse lets pass: null for any key, and numbers that no tensor can hold."""
    for key in _KEYS:
        value, kind = values.get(key), _kind(key)
        if value is None and type(None) not in typing.get_args(kind):
            raise ConfigurationError(f"{key} is null: it must be {_words(kind)}")
        if isinstance(value, int) and not -_TOO_LARGE <= value < _TOO_LARGE:
            raise ConfigurationError(f"{key} is beyond 2**63 either way: no tensor holds that")


def shortened(error: ArgumentError) -> BadInput:
    """Jsonargparse's many lines in one: the key, the value, what was wanted."""
    text = str(error)
    key = re.search(r'[Kk]ey "([^"]+)"', text)
    value = re.search(r"(?:Given|Got) value: (.*)", text)
    if key is not None and value is not None:
        if key[1] in _KEYS:
            return ConfigurationError(f"{key[1]} is {value[1].strip()!r}: it must be {_wanted(key[1])}")
        if nested := re.match(r"NestedArg\(key='(\w+)'", value[1].strip()):
            # --data.path, where --data takes the path itself.
            return BadInput(f"unknown option --{key[1]}.{nested[1]} (did you mean --{key[1]}?)")
        kind = re.search(r"<class '(\w+)'>", text)
        if kind is not None and kind[1] in _KINDS:
            return BadInput(f"--{key[1]} is {value[1].strip()!r}: it must be {_KINDS[kind[1]]}")
    return BadInput(" ".join(text.split()))


def _wanted(key: str) -> str:
    return _words(_kind(key))


@cache
def _kind(key: str) -> Any:
    """The type of a key's value."""
    section, _, name = key.rpartition(".")
    owner: Any = Config
    if section:
        owner = typing.get_type_hints(Config)[section]
    return typing.get_type_hints(owner)[name]


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join(_words(part) for part in typing.get_args(kind))
    return _KINDS.get(kind.__name__, "null" if kind is type(None) else str(kind))
