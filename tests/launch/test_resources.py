"""Resources and site profiles: what is asked for, in which order it counts, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jsonargparse
import pytest

from agrivision import cli
from agrivision.config import Config, flatten
from agrivision.errors import BadInput
from launch.resources import COMMANDS, NAMES, Resources, build, find_site, read_site, take_apart

REPOSITORY = Path(__file__).parents[2]


def said(error: pytest.ExceptionInfo[BadInput]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("30:10", 31),
        ("1:30:00", 90),
        ("1:30:01", 91),
        ("2-0", 2 * 1440),
        ("2-1:10", 2 * 1440 + 70),
        ("1-00:00:01", 1441),
    ],
)
def test_time_is_read_as_slurm_reads_it(text: str, minutes: int) -> None:
    assert build({"time": text}).minutes == minutes


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("nodes", "0", "range such as 2-4"),
        ("nodes", "4-2", "range such as 2-4"),
        ("nodes", "two", "range such as 2-4"),
        ("gpus_per_node", "many", "a100:4"),
        ("tasks_per_node", "1.5", "a whole number"),
        ("tasks_per_node", "0", "at least 1"),
        ("exclusive", "perhaps", "true or false"),
        ("time", "soon", "days-hours"),
        ("time", "0", "more than nothing"),
        ("time", "3", "told to stop at once"),
        ("srun_args", "'open", "No closing quotation"),
        ("comment", "two\nlines", "control character"),
        ("account", "bell\a", "control character"),
    ],
)
def test_wrong_values_are_named(name: str, value: str, wanted: str) -> None:
    with pytest.raises(BadInput) as error:
        build({name: value})
    line = said(error)
    assert f"--{name}" in line and wanted in line


def test_ranks() -> None:
    assert build({}).ranks_per_node == 1
    assert build({"gpus_per_node": "a100:4"}).ranks_per_node == 4
    assert build({"gpus_per_node": "4", "tasks_per_node": "2"}).ranks_per_node == 2
    assert build({"gpus_per_node": "0"}).ranks_per_node == 1


def test_a_range_of_nodes() -> None:
    for text, least, most in (("2-4", 2, 4), ("3", 3, 3)):
        asked = build({"nodes": text})
        assert (asked.least_nodes, asked.most_nodes) == (least, most)


def test_what_is_noted_gives_the_same_resources_again() -> None:
    asked = build({"nodes": "2-4", "time": "1:30:00", "exclusive": "true", "comment": "a: [b, {c"})
    assert build(asked.given()) == asked
    assert Resources().given() == {}


def test_a_command_line_is_taken_apart() -> None:
    words = take_apart(
        ["--nodes", "2", "--config", "f", "--time=1:00:00", "--exclusive", "--seed", "3", "--dry_run"]
    )
    assert words.resources == {"nodes": "2", "time": "1:00:00", "exclusive": "true"}
    assert words.rest == ("--config", "f", "--seed", "3")
    assert words.dry_run and words.site is None
    for line in (["--nodes"], ["--nodes", "--seed", "3"]):
        with pytest.raises(BadInput, match="--nodes needs a value"):
            take_apart(line)


def test_no_resource_takes_away_a_flag_of_a_command() -> None:
    taken = {*NAMES, "site", "dry_run"}
    assert not taken & set(flatten(Config().to_dict()))
    for command in set(COMMANDS) - {"train"}:
        parser = jsonargparse.capture_parser(cli.main, [command])
        flags = {option[2:] for action in parser._actions for option in action.option_strings}
        assert not taken & flags, command


def test_later_layers_win(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(
        "partition: one\naccount: mine\ntime: 1:30:00\nqos: low\n"
        "train: {partition: two}\nsetup: [module load x]\n"
    )
    site = read_site(file)
    environment = {"SBATCH_QOS": "high", "SBATCH_WAIT": "1"}
    asked = build(*site.layers("train", environment), {"account": "theirs"})
    assert asked == Resources(partition="two", account="theirs", time="1:30:00", qos="high")
    assert asked.minutes == 90  # YAML would make the number 5400 of it
    assert build(*site.layers("predict", {})).partition == "one"
    assert site.setup == ("module load x",)


def test_where_the_profile_is_looked_for(tmp_path: Path, home: Path) -> None:
    assert find_site(None, {}).resources == {}
    for name, place in (("a", tmp_path / "a.yaml"), ("b", tmp_path / "b.yaml")):
        place.write_text(f"account: {name}\n")
    own = home / ".config" / "agrivision" / "site.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("account: c\n")
    environment = {"AGRIVISION_SITE": str(tmp_path / "b.yaml")}
    assert find_site(tmp_path / "a.yaml", environment).resources == {"account": "a"}
    assert find_site(None, environment).resources == {"account": "b"}
    assert find_site(None, {}).resources == {"account": "c"}
    with pytest.raises(BadInput, match="nowhere"):
        find_site(tmp_path / "nowhere.yaml", {})


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("partitoin: gpu\n", "did you mean partition?"),
        ("train: {nods: 2}\n", "did you mean nodes?"),
        ("train: {setup: [x]}\n", "unknown key setup"),
        ("nodes: [1, 2]\n", "nodes must be one value"),
        ("nodes: many\n", "--nodes is 'many'"),
        ("setup: module load x\n", "setup must be a list"),
        ("train: gpu\n", "it must hold keys"),
        ("just text\n", "holds no keys"),
        ("a: [1\n", "not valid YAML"),
    ],
)
def test_wrong_profiles_are_named(tmp_path: Path, content: str, wanted: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(content)
    with pytest.raises(BadInput) as error:
        read_site(file)
    line = said(error)
    assert wanted in line and str(file) in line


def test_the_example_is_valid_and_explained() -> None:
    file = REPOSITORY / "configs" / "site.yaml"
    site = read_site(file)
    for command in COMMANDS:
        build(*site.layers(command, {}))
    for line in file.read_text().splitlines():
        text = line.strip()
        assert text.startswith("#") or text.endswith(":") or "#" in text, f"no reason: {line}"


def test_every_resource_is_documented() -> None:
    documentation = Resources.__doc__ or ""
    for entry in dataclasses.fields(Resources):
        assert f"        {entry.name}: " in documentation
