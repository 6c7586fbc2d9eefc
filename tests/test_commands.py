"""What helps to type a command: hints, examples and completion."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from agrivision import cli
from agrivision.commands.completion import script
from agrivision.commands.parsing import flags
from tests.heard import hear_one, refusal


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("trian --run_dir x", "did you mean train?"),
        ("predict --checkpoint a b --out c --symetries", "did you mean --symmetries?"),
        ("inspect x --verfy=1", "did you mean --verify?"),
        ("train --run_dir x --optimiser.lr 3", "did you mean optimizer.lr?"),
        ("tune run --data.path x", "unknown option --data.path (did you mean --data?)"),
        ("evaluate --checkpoint a --data.path=x", "did you mean --data?"),
        ("predict b", "required: --checkpoint, --out"),
        ("inspect", "required: dataset"),
    ],
)
def test_what_was_meant_is_said(words: str, meant: str) -> None:
    assert meant in refusal(words.split())


def test_what_is_like_nothing_gets_no_hint() -> None:
    assert "did you mean" not in refusal(["inspect", "x", "--qqqqqq"])
    assert "did you mean" not in refusal(["qqqqqq"])


@pytest.mark.parametrize("name", sorted(set(cli._COMMANDS) - {"train"}))
def test_the_examples_of_the_help_are_understood(name: str) -> None:
    """Each names options that there are."""
    ending = hear_one([name, "--help"])
    start = ending.out.index("examples:")
    examples = [shlex.split(line) for line in ending.out[start + 1 :] if line]
    assert examples
    for words in examples:
        assert words[:2] == ["agrivision", name]
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert set(given) <= set(flags(cli._COMMANDS[name].parser()))


def completed(words: str, tmp_path: Path) -> set[str]:
    """What bash offers where somebody presses Tab after these words."""
    file = tmp_path / "completion.bash"
    file.write_text("\n".join(hear_one(["completion", "bash"]).out))
    program = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1));'
        ' _shtab_agrivision; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "-c", program, "bash", str(file), *words.split(" ")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert completed("agrivision pre", tmp_path) == {"predict", "prepare"}
    assert completed("agrivision predict --sy", tmp_path) == {"--symmetries"}
    assert completed("agrivision predict --precision b", tmp_path) == {"bf16"}
    assert completed("agrivision predict --checkpoint ru", tmp_path) == {"runs"}
    assert completed("agrivision train --optimizer.mo", tmp_path) == {"--optimizer.momentum"}
    assert completed("agrivision completion z", tmp_path) == {"zsh"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_command_is_completed(shell: str) -> None:
    made = script(cli._COMMANDS, shell)
    assert all(name in made for name in cli._COMMANDS)
