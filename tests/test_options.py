"""Configuration: what is wrong is said in one line that names the key."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import yaml

from agrivision.cli import main
from agrivision.config import Config
from agrivision.errors import AgrivisionError, BadInput, ConfigurationError, ExitCode
from agrivision.options import parse_train, read_config

REPOSITORY = Path(__file__).parents[1]


def refusal(*arguments: str) -> str:
    with pytest.raises(BadInput) as caught:
        parse_train(["--run_dir", "run", *arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_overrides_beat_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 3\noptimizer:\n  lr: 1e-4\n")
    options = parse_train(["--config", str(file), "--run_dir", "run", "--seed", "4"])
    assert options.config.seed == 4
    assert options.config.optimizer.lr == 1e-4
    assert options.run_dir == Path("run")
    assert not options.resume_with_changes


def test_a_run_directory_lends_its_configuration(tmp_path: Path) -> None:
    config = Config(seed=11)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert parse_train(["--run_dir", str(tmp_path)]).config == config


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = dataclasses.replace(
        Config(), data=dataclasses.replace(Config().data, crop=64, path="a b"), seed=2**62
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert read_config(file) == config


CONFIGURATIONS = {path.name for path in (REPOSITORY / "configs").glob("*.yaml")} - {"site.yaml"}


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_shipped_configurations_are_valid_and_explained(name: str) -> None:
    file = REPOSITORY / "configs" / name
    read_config(file)
    for line in file.read_text().splitlines():
        key, _, value = line.split("#")[0].partition(":")
        assert not value.strip() or "#" in line, f"{name}: no reason for {key.strip()}"


def test_unknown_keys_are_answered_with_the_valid_ones(tmp_path: Path) -> None:
    line = refusal("--data.pth", "x")
    assert "data.pth" in line and "data.path" in line and "data.batch_size" in line
    file = tmp_path / "config.yaml"
    file.write_text("optimizer:\n  learning_rate: 1\n")
    line = refusal("--config", str(file))
    assert "optimizer.learning_rate" in line and "optimizer.lr" in line and str(file) in line
    file.write_text("optimiser:\n  lr: 1\n")
    assert "optimizer" in refusal("--config", str(file))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("data.crop", "wide", "a whole number or null"),
        ("data.batch_size", "1.5", "a whole number"),
        ("optimizer.lr", "fast", "a number"),
        ("optimizer.name", "adam", "adamw or sgd"),
        ("training.deterministic", "maybe", "true or false"),
        ("optimizer.lr", "-1", "positive"),
        ("optimizer.lr", "nan", "a number"),
        ("data.batch_size", "0", "at least 1"),
        ("model.dropout", "1.0", "below 1"),
        ("training.keep_last", "0", "at least 1"),
        ("seed", "-1", "between 0 and"),
    ],
)
def test_wrong_values_name_key_value_and_what_is_wanted(key: str, value: str, wanted: str) -> None:
    line = refusal(f"--{key}", value)
    assert key in line and value in line and wanted in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("synthesize out --tiles many", "--tiles is 'many': it must be a whole number"),
        ("prepare source out --val_fraction half", "--val_fraction is 'half': it must be a number"),
        ("evaluate --checkpoint x --data y --batch_size 1.5", "--batch_size is '1.5'"),
        ("predict x --checkpoint y --out z --precision fp8", "invalid choice: 'fp8'"),
    ],
)
def test_wrong_values_of_other_commands_are_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == ExitCode.BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: [1, 2", "not valid YAML"),
        ("just text", "holds no keys"),
        ("data: 5\n", "data is a section"),
        ("data:\n  crop: wide\n", "data.crop"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content)
    line = refusal("--config", str(file))
    assert said in line


def test_a_file_in_utf_16_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 0\n", encoding="utf-16")
    assert "save it as that" in refusal("--config", str(file))
    file.write_text("seed: 7\n", encoding="utf-8-sig")
    assert read_config(file).seed == 7


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    assert "it is no plain file" in refusal("--config", str(tmp_path / "config.yaml"))


def test_a_section_takes_no_file(tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text("crop: 64\n")
    for arguments in (["--data", str(file)], [f"--data={file}"], ["--model", "x"]):
        assert f"{arguments[0][:6]}" in (line := refusal(*arguments)) and "is a section" in line


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refusal("--config", str(tmp_path / "nowhere.yaml"))


def test_no_run_directory() -> None:
    with pytest.raises(AgrivisionError, match="run_dir"):
        parse_train(["--seed", "1"])


def test_valid_convolutions_are_for_the_own_encoder() -> None:
    with pytest.raises(ConfigurationError, match="valid"):
        parse_train(["--run_dir", "r", "--model.encoder", "resnet18", "--model.convolution", "valid"])
