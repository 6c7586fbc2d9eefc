"""Every field of a job reaches Slurm as one word, or is refused."""

from __future__ import annotations

import dataclasses
import re
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from agrivision.errors import BadInput
from launch import slurm
from launch.resources import Resources, build, check_text, take_apart
from launch.submit import Setting, check_path, script

TEXTS = [field.name for field in dataclasses.fields(Resources) if "str" in str(field.type)]
HOSTILE = st.one_of(
    st.text(),
    st.text(string.printable),
    st.text("abcz019-_=,.:/%\\'\"`$();&|<>#*?[]{}!~@+ \t\n\r\0é\u2028\x85\udc80", max_size=40),
    st.sampled_from(
        [
            "x\n#SBATCH --wrap=id",
            "x --export=ALL,LD_PRELOAD=/tmp/x",
            "--wrap=id",
            "-x",
            "/etc/passwd",
            "%j",
            "%x",
            "a%A_%a",
            "x' --wrap='id",
            'x" --wrap="id',
            "x\\",
            "\\",
            "'",
            "$(id)",
            "`id`",
            "a;id",
            "#",
            " ",
            "x#y",
            "x # y",
            "~",
            "ALL",
            "NONE",
            "a" * 9000,
            "gpu:2 --wrap=id",
        ]
    ),
)


def words_of(line: str) -> list[str]:
    """What sbatch makes of the rest of an `#SBATCH` line: quotes, and backslashes in them, too."""
    words, word, quote, begun = [], "", "", False
    chars = iter(line)
    for char in chars:
        if char == "\\":
            word, begun = word + next(chars, ""), True
        elif char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote, begun = char, True
        elif not quote and char in " \t\v\f\r":
            words += [word] if begun else []
            word, begun = "", False
        elif not quote and not begun and char == "#":
            break
        else:
            word, begun = word + char, True
    assert not quote, f"a quote that does not end: {line}"
    return words + ([word] if begun else [])


def options_of(text: str) -> dict[str, str]:
    """The options that a script asks sbatch for; every line holds exactly one."""
    found = {}
    for line in text.split("\n"):
        if line.startswith("#SBATCH"):
            (word,) = words_of(line.removeprefix("#SBATCH"))
            name, _, value = word.removeprefix("--").partition("=")
            assert name not in found
            found[name] = value
    return found


@pytest.mark.parametrize("name", TEXTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=HOSTILE)
@example(value="plain")
def test_a_field_is_one_word_or_refused(name: str, value: str) -> None:
    try:
        resources = build({name: value})
    except BadInput:
        return
    folder = Path("/runs/first/launch")
    setting = Setting(resources=resources, setup=(), python=("python",))
    plain = Setting(resources=build({}), setup=(), python=("python",))
    text = script(folder, folder / "code", "first", setting)
    options = options_of(text)
    option = name.replace("_", "-")
    if name in ("time", "nodes"):
        assert not value or re.fullmatch(r"\d+(-\d+)?", options[option])
    elif name != "srun_args" and value not in ("", "null"):
        assert options.pop(option) == value
    allowed = options_of(script(folder, folder / "code", "first", plain)).keys()
    assert options.keys() <= allowed | {"time", "mincpus"}
    # Below its head the script is the same, but for what the shell is told of the ranks.
    assert [line for line in body(text) if "RANKS_PER_NODE" not in line] == body(
        script(folder, folder / "code", "first", plain)
    )


def body(text: str) -> list[str]:
    return [line for line in text.split("\n") if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nodelist", "/data/nodes"),  # to sbatch the name of a file
        ("exclude", "./nodes"),
        ("partition", "-x"),
        ("account", "a b"),
        ("mail_user", "-oQ/tmp"),
        ("mail_user", "a@b;id"),
        ("gres", "gpu:2 --wrap=id"),
        ("dependency", "afterok:1 --wrap=id"),
        ("qos", "$(id)"),
        ("comment", "x\u2028y"),
        ("comment", "c" * 1001),
        ("mem", "lots"),
    ],
)
def test_what_slurm_would_take_otherwise_is_refused(name: str, value: str) -> None:
    with pytest.raises(BadInput, match=f"--{name}"):
        build({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nodelist", "n[1-4,7],gpu-01.site"),
        ("partition", "gpu,gpu-long"),
        ("account", "proj_7@site"),
        ("mail_user", "some.one+jobs@site.example"),
        ("mail_type", "FAIL,TIME_LIMIT_90"),
        ("gres", "gpu:a100:2,disk:100"),
        ("dependency", "afterok:17:18_3,singleton"),
        ("dependency", "after:17+5?afterany:18"),
        ("constraint", "[rack1*2&rack2*4]"),
        ("constraint", "a100&ib|(v100)"),
        ("mem", "64G"),
        ("mem", "1.5tb"),
        ("comment", 'it\'s 50% \\ "done" #1; $(id) — ü'),
        ("job_name", "my run #1"),
    ],
)
def test_what_clusters_use_is_accepted(name: str, value: str) -> None:
    assert getattr(build({name: value}), name) == value


@given(value=st.text(st.characters(categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1))
def test_no_argument_holds_what_no_line_can(value: str) -> None:
    for call in (check_text, lambda what, text: take_apart(["--out", text])):
        with pytest.raises(BadInput):
            call("an argument", f"a{value}b")


@pytest.mark.parametrize("char", "%\\:")
def test_no_path_holds_what_slurm_replaces(char: str) -> None:
    with pytest.raises(BadInput, match="choose another folder"):
        check_path(Path(f"/runs/a{char}j/launch"))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for all of Slurm's commands, which notes its words one by one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        file = folder / name
        file.write_text(
            f'#!/bin/bash\nprintf \'%s\\0\' "$@" > "{tmp_path}/{name}"\ncat > "{tmp_path}/input"\n'
            f'if [[ -e "{tmp_path}/said" ]]; then cat "{tmp_path}/said"; fi\n'
        )
        file.chmod(0o700)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return tmp_path


def noted(calls: Path, name: str) -> list[str]:
    return (calls / name).read_bytes().decode(errors="surrogateescape").split("\0")[:-1]


WORDS = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30),
    min_size=1,
    max_size=5,
)
FEW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FEW
@given(values=WORDS)
def test_words_reach_a_command_one_by_one(calls: Path, values: list[str]) -> None:
    slurm.update("17", **{f"Key{place}": value for place, value in enumerate(values)})
    keys = [f"Key{place}={value}" for place, value in enumerate(values)]
    assert noted(calls, "scontrol") == ["update", "JobId=17", *keys]
    (calls / "said").write_text("Submitted 18\n")
    assert slurm.submit("script", options=["--parsable"], arguments=values) == "Submitted 18"
    assert noted(calls, "sbatch") == ["--parsable", "--parsable", "script", *values]


@FEW
@given(command=WORDS, comment=st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1))
def test_a_successor_asks_for_the_same_and_runs_its_words(
    calls: Path, command: list[str], comment: str
) -> None:
    """What squeue says of the job goes back to sbatch; the script's shell gets the same words."""
    teller = calls / "teller"
    teller.write_text(f'#!/bin/bash\nprintf \'%s\\0\' "$@" > "{calls}/told"\n')
    teller.chmod(0o700)
    assume(comment not in slurm._NOTHING)
    cells = {"Comment": comment, "Name": "a b"}
    row = b"".join(cells.get(name, "").encode().ljust(slurm._LONG_COLUMN) for name in slurm._ASKED)
    (calls / "said").write_bytes(row)
    lines = [f"touch {calls}/first"]
    slurm.submit_successor("17", [str(teller), *command], ["--no-requeue"], lines)
    words = noted(calls, "sbatch")
    assert f"--comment={comment}" in words and "--job-name=a b" in words
    assert all(word == "--parsable" or word.startswith("--") for word in words)
    subprocess.run(["bash", str(calls / "input")], check=True)
    assert (calls / "told").read_bytes().decode().split("\0")[:-1] == command
    (calls / "first").unlink()


@pytest.mark.parametrize(
    "job", ["", "-u", "17;id", "--all", "17,18", "17\n", "a", "1_", "17_3_4", "1 2"]
)
def test_what_is_no_job_is_not_cancelled(calls: Path, job: str) -> None:
    for act in (
        lambda: slurm.cancel(["17", job]),
        lambda: slurm.requeue(job),
        lambda: slurm.update(job, Dependency="x"),
        lambda: slurm.queue(["17", job]),
    ):
        with pytest.raises(slurm.SlurmError, match="is no job id"):
            act()
    assert not list(calls.glob("s[bcq]*"))
