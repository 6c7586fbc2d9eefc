"""Slurm as other sites have it: answers as recorded, with what was changed in each."""

from __future__ import annotations

import json
import pwd
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agrivision import slurm
from agrivision.doctor import cluster as module
from agrivision.doctor.cluster import Wanted, examine_slurm, missing
from agrivision.doctor.finding import Verdict
from agrivision.doctor.pace import Pace, pace_of
from agrivision.slurm import SlurmError, fields, settings
from tests.doctor.said import about, worse

ROOT = Path(__file__).parents[2]
QUICK = Pace(step=1.0, save=1.0, known=True)  # 3 s
CONFIG = """\
Configuration data as of 2026-11-23T00:45:06
AccountingStorageEnforce = associations,limits
AccountingStorageType   = accounting_storage/slurmdbd
AuthType                = auth/munge
ClusterName             = farm
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
MaxJobCount             = 10000
MinJobAge               = 300 sec
PowerPlugin             = 
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SlurmctldHost[0]        = head(10.0.0.1)

Slurmctld(primary) at head is UP
"""  # noqa: W291 - as printed
PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL Default=YES GraceTime=0 MaxTime=2-00:00:00 PreemptMode=OFF State=UP
PartitionName=scavenge Default=NO GraceTime=120 MaxTime=UNLIMITED PreemptMode=REQUEUE State=UP
"""
NODES = (
    "gpu|g1|mixed|gpu:a100:4(S:0-1)\nscavenge|g1|mixed|gpu:a100:4(S:0-1)\nscavenge|c1|idle~|(null)\n"
)
ANSWERS = {
    "sinfo --version": "slurm 24.11.3\n",
    "scontrol ping": "Slurmctld(primary) at head is UP\n",
    "scontrol show config": CONFIG,
    "scontrol --oneliner show partition": PARTITIONS,
    "sinfo --noheader --Node": NODES,
    "sacctmgr": "crops||normal|||||\n",
    "sbatch --test-only": "sbatch: Job 7 to start at 2026-11-23T00:50:00 using 1 processors on nodes g1"
    " in partition gpu\n",
}


def site(**changes: str | Exception) -> Callable[..., str]:
    """Answers as Slurm does; a change is named by the beginning of the command, with `_` for blanks."""
    answers = {**ANSWERS, **{name.replace("_", " "): answer for name, answer in changes.items()}}

    def call(command: Sequence[str], text: str = "", *, check: bool = True) -> str:
        words = " ".join(command)
        (answer,) = [answer for beginning, answer in answers.items() if words.startswith(beginning)]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return call


def test_a_good_site_is_good() -> None:
    found = list(examine_slurm(Wanted(), QUICK, site()))
    assert worse(found) == []
    assert about(found, "partition gpu (default)").what.endswith(
        "UP, 1 of 1 nodes in order, limit 2-00:00:00, gpu:a100:4"
    )
    assert "120 s (GraceTime) and 30 s (KillWait)" in about(found, "PreemptMode=REQUEUE").what
    assert "Account crops, QOS normal" in about(found, "your account").what
    assert about(found, "a job like ours").what.endswith("partition gpu, from 2026-11-23T00:50:00")


@pytest.mark.parametrize(
    ("old", "new", "verdict", "words"),
    [
        ("JobRequeue              = 1", "JobRequeue = 0", "careful", "JobRequeue is 0"),
        ("AuthType                = auth/munge", "AuthType = auth/none", "careful", "auth/none"),
        ("KillWait                = 30 sec", "KillWait = 2 sec", "careful", "KillWait is 2 s"),
        ("MinJobAge               = 300 sec", "MinJobAge = 2 sec", "careful", "MinJobAge is 2 s"),
    ],
)
def test_a_setting_that_hurts_is_named(old: str, new: str, verdict: str, words: str) -> None:
    assert old in CONFIG
    call = site(scontrol_show_config=CONFIG.replace(old, new))
    ((found, what),) = worse(examine_slurm(Wanted(), QUICK, call))
    assert (found, words in what) == (verdict, True), what


@pytest.mark.parametrize(
    ("old", "new", "wanted", "verdict", "words"),
    [
        ("State=UP\nPart", "State=DOWN\nPart", Wanted(), "bad", "partition gpu (default): DOWN"),
        ("State=UP\nPart", "State=DRAIN\nPart", Wanted(partition="scavenge"), "careful", "DRAIN"),
        ("Default=YES", "Default=NO", Wanted(), "careful", "no partition is the default"),
        ("MaxTime=2-00:00:00", "MaxTime=00:10:00", Wanted(), "careful", "limit 00:10:00"),
        ("PreemptMode=REQUEUE", "PreemptMode=SUSPEND", Wanted(), "careful", "are suspended"),
        ("GraceTime=120", "GraceTime=0", Wanted(), "careful", "0 s (GraceTime)"),
        ("", "", Wanted(partition="none"), "bad", "there is no partition none"),
        ("", "", Wanted(signal_seconds=2), "careful", "warned 2 s before"),
        ("", "", Wanted(signal_seconds=1), "bad", "warned 1 s before"),
    ],
)  # fmt: skip
def test_a_partition_or_wish_that_hurts_is_named(
    old: str, new: str, wanted: Wanted, verdict: str, words: str
) -> None:
    assert old in PARTITIONS
    call = site(**{"scontrol_--oneliner_show_partition": PARTITIONS.replace(old, new, 1)})
    ((found, what),) = worse(examine_slurm(wanted, QUICK, call))
    assert (found, words in what) == (verdict, True), what


@pytest.mark.parametrize(
    ("pace", "partition", "verdict"),
    [(49.0, "scavenge", "good"), (51.0, "scavenge", "careful"), (101.0, "scavenge", "bad"),
     (101.0, "gpu", "careful")],
)  # fmt: skip
def test_what_a_save_takes_is_compared_with_grace_and_killwait(
    pace: float, partition: str, verdict: str
) -> None:
    """150 s against one and a half times a step and a save, as training itself counts."""
    slow = Pace(step=pace, save=pace, known=True)
    wanted = Wanted(partition=partition, signal_seconds=1000)
    found = about(examine_slurm(wanted, slow, site()), "PreemptMode=REQUEUE")
    assert found.verdict == verdict


@pytest.mark.parametrize(
    "state", ["down*", "drained", "drained*", "idle*", "maint", "reserved", "unknown"]
)
def test_nodes_that_cannot_be_had_are_named(state: str) -> None:
    call = site(**{"sinfo_--noheader_--Node": NODES.replace("gpu|g1|mixed", f"gpu|g1|{state}")})
    ((verdict, what),) = worse(examine_slurm(Wanted(), QUICK, call))
    assert (verdict, what.endswith(f"its nodes: {state}")) == ("bad", True), what


def test_gpus_are_looked_for_where_they_are_wanted() -> None:
    nodes = "gpu|g1|idle|(null)\nscavenge|g1|idle|(null)\n"
    call = site(**{"sinfo_--noheader_--Node": nodes})
    assert worse(examine_slurm(Wanted(), QUICK, call)) == []
    ((verdict, what),) = worse(examine_slurm(Wanted(gpus_per_node="4"), QUICK, call))
    assert (verdict, what.endswith("no GPUs")) == ("bad", True)


@pytest.mark.parametrize(
    ("name", "answer", "verdict", "words"),
    [
        ("scontrol_ping", "Slurmctld(primary) at head is DOWN\n****\n", "bad", "at head is DOWN"),
        ("scontrol_show_config", SlurmError("Unable to contact slurm controller"), "bad", "Unable"),
        ("scontrol_show_config", SlurmError("Invalid authentication credential"), "bad", "who you are"),
        ("sbatch_--test-only", SlurmError("Invalid account"), "bad", "refused: Invalid account"),
        ("sacctmgr", SlurmError("Connection refused"), "careful", "accounting does not answer"),
        ("sacctmgr", "", "bad", "you have no account"),
        ("sacctmgr", "crops||normal|1|||| \n".replace(" ", ""), "careful", "MaxJobs 1"),
        ("sinfo_--version", "slurm 18.08.1\n", "careful", "18.08.1"),
    ],
)
def test_an_answer_that_hurts_is_named(
    name: str, answer: str | Exception, verdict: str, words: str
) -> None:
    ((found, what),) = worse(examine_slurm(Wanted(), QUICK, site(**{name: answer})))
    assert (found, words in what) == (verdict, True), what


@pytest.mark.parametrize(("known", "asked"), [(True, "farmer"), (False, "1042")])
def test_accounting_is_asked_by_name(known: bool, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sacctmgr knows users; whoever has no name is asked for by number."""
    record = pwd.struct_passwd(("farmer", "x", 1042, 1042, "", "/", "/bin/sh"))
    monkeypatch.setattr(module.os, "getuid", lambda: 1042)
    monkeypatch.setattr(module.pwd, "getpwuid", {1042: record}.__getitem__ if known else {}.__getitem__)
    asked_for: list[Sequence[str]] = []
    answer = site()

    def call(command: Sequence[str], text: str = "", *, check: bool = True) -> str:
        asked_for.append(command)
        return answer(command, text, check=check)

    assert worse(examine_slurm(Wanted(), QUICK, call)) == []
    (command,) = [each for each in asked_for if each[0] == "sacctmgr"]
    assert command == [
        "sacctmgr",
        "--noheader",
        "--parsable2",
        "show",
        "associations",
        "where",
        f"user={asked}",
        "format=Account,Partition,QOS,MaxJobs,MaxSubmit,MaxWall,GrpTRES,MaxTRES",
    ]


def test_a_controller_behind_which_another_stands_is_a_warning() -> None:
    both = "Slurmctld(primary) at head is DOWN\nSlurmctld(backup) at head2 is UP\n"
    ((verdict, what),) = worse(examine_slurm(Wanted(), QUICK, site(scontrol_ping=both)))
    assert (verdict, "primary" in what, "backup" in what) == ("careful", True, False)


def test_no_slurm_is_a_fact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = missing()
    assert found is not None
    assert (found.verdict, "not here" in found.what) == (Verdict.GOOD, True)


def test_commands_that_know_no_cluster_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.slurm, "available", lambda: True)
    error = SlurmError("sinfo: fatal: Could not establish a configuration source")
    found = missing(site(**{"sinfo_--version": error}))
    assert found is not None and found.verdict == Verdict.CAREFUL
    assert missing(site()) is None


def test_slurms_answers_are_read() -> None:
    assert settings(CONFIG)["KillWait"] == "30 sec"
    assert settings(CONFIG)["PowerPlugin"] == ""
    assert settings(CONFIG)["SlurmctldHost[0]"] == "head(10.0.0.1)"
    line = "JobId=7 Command=/a b=c JobName=x Reason=None Comment= GRES/gpu=2"
    assert fields(line) == {
        "JobId": "7",
        "Command": "/a b=c",
        "JobName": "x",
        "Reason": "None",
        "Comment": "",
        "GRES/gpu": "2",
    }


def test_a_command_that_hangs_or_fails_is_one_line(tmp_path: Path) -> None:
    for words, said in [
        (["sleep", "600"], "sleep did not answer within 1 s"),
        (["ls", str(tmp_path / "none")], "ls: ls: cannot access"),
        (["no-such-command"], "no no-such-command on the PATH"),
    ]:
        with pytest.raises(SlurmError, match=said):
            slurm.call(words, seconds=1)


def test_the_templates_warn_as_early_as_is_assumed() -> None:
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    assert f"#SBATCH --signal=USR1@{slurm.SIGNAL_SECONDS}\n" in text


def run_with(folder: Path, *rows: dict[str, object], log: str = "") -> Path:
    """A run of batches of 32 that wrote these rows and then was torn away."""
    (folder / "log").mkdir()
    (folder / "log" / "rank-0.log").write_text(log)
    (folder / "config.yaml").write_text("data:\n  batch_size: 32\n")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "training", "ste')
    return folder


def trained(step: int, images_per_second: float) -> dict[str, object]:
    return {"kind": "training", "step": step, "images_per_second": images_per_second}


EVALUATED = {"kind": "evaluation", "step": 2, "miou": 0.5}
LOG = (
    "2026-11-22 22:05:10,913 INFO agrivision.training.saver: step 25 saved in 0.3 s, training …\n"
    "2026-11-22 22:05:41,468 INFO agrivision.training.saver: step 50 saved in 12.5 s, training …\n"
)


def test_the_pace_is_that_of_the_run(tmp_path: Path) -> None:
    assert not pace_of(tmp_path, None).known
    pace = pace_of(
        run_with(tmp_path, trained(1, 16.0), trained(2, 8.0), trained(3, 2.0), log=LOG), None
    )
    assert (pace.step, pace.save, pace.known) == (4.0, 12.5, True)
    assert pace.needed == 25  # half as much again as 16.5, rounded up
    assert str(pace).startswith("25 s for a step (4.0 s) and a save (12.5 s), ")
    assert str(pace).endswith(" half as much again")


def test_the_time_of_an_evaluation_is_none_of_a_step(tmp_path: Path) -> None:
    """The row after it tells of both; here each second row is one."""
    rows = [
        trained(1, 16.0),
        EVALUATED,
        trained(2, 0.01),
        trained(3, 16.0),
        EVALUATED,
        trained(4, 0.01),
    ]
    assert pace_of(run_with(tmp_path, *rows, log=LOG), None).step == 2.0


def test_where_every_row_has_an_evaluation_these_are_taken(tmp_path: Path) -> None:
    assert pace_of(run_with(tmp_path, EVALUATED, trained(2, 4.0), log=LOG), None).step == 8.0


def test_what_rows_tell_of_saves_comes_before_the_log(tmp_path: Path) -> None:
    saves = [
        {"kind": "checkpoint", "step": step, "seconds": seconds, "stall_seconds": 0.1}
        for step, seconds in [(1, 2.5), (2, 1.5)]
    ]
    assert pace_of(run_with(tmp_path, trained(1, 16.0), *saves, log=LOG), None).save == 2.5


def test_a_guessed_pace_counts_with_the_disk(tmp_path: Path) -> None:
    assert pace_of(None, 497e6).save == 1.0
    assert pace_of(None, 497e5).save == 10.0
    assert pace_of(tmp_path, 497e6).save == 1.0


def test_the_line_of_a_save_is_the_one_that_is_looked_for() -> None:
    assert '"step %d saved in %.1f s' in (ROOT / "agrivision" / "training" / "saver.py").read_text()
