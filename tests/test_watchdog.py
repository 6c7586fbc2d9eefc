"""Who keeps a run waiting: from tables of what ranks say; and what the watchdog's parts survive."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from agrivision import ending, watchdog
from agrivision.config import TrainingConfig
from agrivision.distributed import waiting_time
from agrivision.ending import STALLED, Ending, read_endings, report_ending, report_stall
from agrivision.errors import ConfigurationError, ExitCode
from agrivision.heartbeat import Beat, Heard, Verdict, find_straggler, judge, table
from agrivision.notes import Notes
from agrivision.phase import WAITING, current, moved, phase
from agrivision.rundir import RunDirectory
from agrivision.stacks import began, compiling, kernel_view, stacks
from agrivision.training.saver import Saver
from agrivision.watchdog import Watchdog, _Circle, _Slow
from agrivision.world import World
from launch.decision import Result
from launch.decision import judge as judge_endings

LIMIT, PERIOD = 900.0, 10.0
PATIENCE = 60.0  # seconds until something that does not happen fails a test


def beat(rank: int = 0, name: str = "forward", **changes: Any) -> Beat:
    own = Beat(
        rank=rank, node=f"n{rank}", host="here", pid=100 + rank, born=1, number=1, phase=name,
        waits=name in (WAITING, "backward"), quiet=0.0, meetings=7, spent={},
    )  # fmt: skip
    return dataclasses.replace(own, **changes)


def heard(*rows: tuple[str, float, float, int]) -> list[Heard]:
    """Ranks as (phase, seconds that they have been quiet for, age of the heartbeat, meetings)."""
    return [
        Heard(beat(rank, name, quiet=quiet, meetings=meetings), age)
        for rank, (name, quiet, age, meetings) in enumerate(rows)
    ]


def culprits(*rows: tuple[str, float, float, int]) -> list[int] | None:
    verdict = judge(heard(*rows), LIMIT, PERIOD)
    return None if verdict is None else [each.rank for each in verdict.culprits]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # It gets on.
        ([("forward", 0, 0, 7), (WAITING, 5, 0, 8)], None),
        # One does something that takes long, and gets on; whoever waits for it is patient.
        ([("evaluate", 20, 0, 7), (WAITING, 2000, 0, 8)], None),
        # One hangs, the others wait.
        ([("wait for data", 901, 0, 7), (WAITING, 899, 0, 8), (WAITING, 899, 0, 8)], [0]),
        ([(WAITING, 899, 0, 8), ("wait for the disk", 901, 0, 7)], [1]),
        ([("backward", 880, 0, 7), ("forward", 901, 0, 7)], [1]),
        # Not yet.
        ([(WAITING, 899, 0, 8), ("wait for the disk", 899, 0, 7)], None),
        # One has stopped, wherever it was.
        ([(WAITING, 890, 0, 8), ("forward", 2, 899, 7)], [1]),
        ([(WAITING, 890, 0, 8), (WAITING, 2, 901, 8)], [1]),
        # All wait, and one of them has not been heard of for a while: it waits for nobody.
        ([(WAITING, 901, 0, 8), (WAITING, 500, 402, 8)], [1]),
        # A heartbeat that is late says nothing.
        ([(WAITING, 901, 0, 8), (WAITING, 881, 20, 8)], []),
        # All wait, and one of them for what the others have behind them.
        ([(WAITING, 901, 0, 8), ("backward", 905, 0, 7), (WAITING, 901, 0, 8)], [1]),
        ([(WAITING, 901, 0, 9), (WAITING, 905, 0, 8)], [1]),
        # All wait for one another.
        ([("backward", 901, 0, 7), ("backward", 905, 0, 7)], []),
        ([(WAITING, 901, 0, 7), (WAITING, 899, 0, 7)], None),
        # All hang in something of their own.
        ([("wait for data", 901, 0, 7), ("wait for data", 901, 0, 7)], [0, 1]),
        # Alone.
        ([("wait for data", 901, 0, 0)], [0]),
        ([("wait for data", 899, 0, 0)], None),
        ([(WAITING, 901, 0, 0)], [0]),
    ],
)
def test_who_is_guilty(rows: list[tuple[str, float, float, int]], expected: list[int] | None) -> None:
    assert culprits(*rows) == expected


ROWS = st.lists(
    st.tuples(
        st.sampled_from([WAITING, "backward", "forward", "wait for data", "evaluate"]),
        st.floats(0, 2000),
        st.floats(0, 2000),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
)


@given(ROWS, st.randoms(use_true_random=False))
def test_the_verdict_whatever_ranks_say(rows: list[tuple[str, float, float, int]], random: Any) -> None:
    ranks = heard(*rows)
    verdict = judge(ranks, LIMIT, PERIOD)
    shuffled = random.sample(ranks, len(ranks))
    again = judge(shuffled, LIMIT, PERIOD)
    hang = {each.beat.rank for each in ranks if not each.beat.waits and each.quiet >= LIMIT}
    lost = {each.beat.rank for each in ranks if each.age >= LIMIT}
    if verdict is None:
        assert again is None and not hang and not lost
        assert any(each.quiet < LIMIT for each in ranks)
        return
    named = {each.rank for each in verdict.culprits}
    if len(hang | lost) <= 8:
        assert again is not None and {each.rank for each in again.culprits} == named
        # Nobody who merely waits, and can be heard, is named where somebody hangs.
        assert named == hang | lost or not hang | lost
    assert verdict.line.startswith(STALLED) and "\n" not in verdict.line
    for each in verdict.culprits:
        assert f"rank {each.rank} on n{each.rank} (process {100 + each.rank})" in verdict.line
    assert Verdict.decode(verdict.encode()) == verdict
    assert all(Beat.decode(each.beat.encode()) == each.beat for each in ranks)
    assert sum(line.count("rank ") for line in table(ranks).splitlines()) >= min(len(ranks), 1)


def test_a_thousand_ranks_make_a_short_line() -> None:
    verdict = judge(heard(*[("wait for data", 901.0, 0.0, 7)] * 1024), LIMIT, PERIOD)
    assert verdict is not None
    assert len(verdict.culprits) == 8 and verdict.line.endswith("; and 1016 more ranks")
    assert table(heard(*[(WAITING, 1.0, 0.0, 7)] * 1024)).endswith("rank 7 on n7 and 1016 more")


def stretch(*own: dict[str, float], meetings: int = 9) -> tuple[list[Beat], list[Beat]]:
    """Heartbeats around a stretch of time in which ranks spent these seconds on their own work."""
    before = [beat(rank, spent=dict.fromkeys(spent, 100.0)) for rank, spent in enumerate(own)]
    after = [
        beat(rank, spent={name: 100.0 + each for name, each in spent.items()}, meetings=meetings)
        for rank, spent in enumerate(own)
    ]
    return before, after


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([50, 50, 50, 90], 3),
        ([90, 50], 0),
        ([50, 60, 55, 58], None),  # not by far
        ([1, 1, 1, 9], None),  # by far, but it costs little
        ([0, 0], None),
        ([90], None),
    ],
)
def test_stragglers(own: Sequence[float], expected: int | None) -> None:
    before, after = stretch(*({"forward": each} for each in own))
    found = find_straggler(before, after, 100.0)
    assert (None if found is None else found.rank) == expected


def test_what_a_straggler_is_slow_at_is_named() -> None:
    before, after = stretch(
        {"forward": 9.0, "wait for data": 1.0}, {"forward": 9.0, "wait for data": 60.0}
    )
    found = find_straggler(before, after, 100.0)
    assert found is not None
    assert found.line.endswith("work took 69 s, theirs 10 s; most of it in 'wait for data'")
    before, after = stretch({"forward": 9.0}, {"forward": 69.0}, meetings=7)
    assert find_straggler(before, after, 100.0) is None  # it hangs, which is another matter


def test_a_straggler_is_named_when_it_stays_one_and_then_seldom() -> None:
    slow, named = _Slow(LIMIT), []
    for minute in range(60):
        beats = [
            beat(rank, spent={"forward": speed * minute}, meetings=minute)
            for rank, speed in enumerate((20.0, 50.0))
        ]
        named += [minute] * (slow.look(beats, 60.0 * minute) is not None)
    assert named == [10, 25, 40, 55]


def test_phases_say_whether_the_main_thread_gets_on() -> None:
    before = current()
    with phase("evaluate"):
        inside = current()
        assert inside.name == "evaluate" and inside.moves != before.moves
        assert current().moves == inside.moves
        moved()
        assert current().moves != inside.moves
        with phase(WAITING):
            assert current().meetings == before.meetings + 1
        assert current().name == "evaluate"
    after = current()
    assert after.name == before.name and after.meetings == before.meetings + 1
    names = {"evaluate", WAITING, before.name}
    assert all(after.spent[name] >= before.spent.get(name, 0.0) for name in names)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def test_notes_reach_who_wants_them() -> None:
    store = HashStore()
    with Notes(store, ["b"], 0.01) as one, Notes(store, ["a", "never"], 0.01) as other:
        one.leave("a", "1")
        other.leave("b", "2")
        until(lambda: one.read == {"b": "2"} and other.read == {"a": "1"})
        one.leave("a", "3")
        one.want(["c"])
        other.leave("c", "4")
        until(lambda: one.read == {"b": "2", "c": "4"} and other.read == {"a": "3"})
        assert not one.gone


class Silent:
    """A store in a process that is stopped: it takes what is sent, and answers nothing."""

    def __init__(self) -> None:
        self.asked, self.goes_on = threading.Event(), threading.Event()

    def set(self, name: str, text: str) -> None: ...

    def check(self, names: list[str]) -> bool:
        self.asked.set()
        self.goes_on.wait()
        return False


def test_who_leaves_notes_does_not_wait_for_a_store_that_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agrivision.notes._CLOSE_SECONDS", 0.1)
    store: Any = Silent()
    with Notes(store, ["a"], 0.01) as notes:
        assert store.asked.wait(PATIENCE)
        for number in range(1000):
            notes.leave("b", str(number))
        assert notes.read == {} and not notes.gone
    store.goes_on.set()


class Gone:
    def check(self, names: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


def test_a_store_that_is_gone() -> None:
    store: Any = Gone()
    with Notes(store, ["a"], 0.01) as notes:
        until(lambda: notes.gone)


def test_rank_0_names_a_rank_that_never_said_a_word_and_the_others_believe_it() -> None:
    store = HashStore()
    worlds = [World(rank=rank, size=3, local_size=3, hosts=("n1", "n1", "n2")) for rank in range(3)]
    main, other = (_Circle(world, LIMIT, PERIOD) for world in worlds[:2])
    wanted = ["word of rank 0", *(f"beat {rank}" for rank in range(3))]
    with Notes(store, wanted, 0.01) as main.notes, Notes(store, wanted, 0.01) as other.notes:
        here = beat(1, WAITING)
        assert main.judge(beat(0, WAITING), 0.0) is None
        assert other.judge(here, 0.0) is None
        until(lambda: main.notes.read.keys() >= {"beat 0", "beat 1"})
        assert main.judge(beat(0, WAITING, quiet=1.0), 1.0) is None
        verdict = main.judge(beat(0, WAITING, quiet=LIMIT), LIMIT + 1.0)
        assert verdict is not None and [each.rank for each in verdict.culprits] == [1, 2]
        assert "rank 2 on n2 has not been heard of" in verdict.line
        until(lambda: json.loads(other.notes.read.get("word of rank 0", '{"verdict": 0}'))["verdict"])
        assert other.judge(here, 3.0) == verdict


def test_the_others_name_rank_0_when_its_word_stays_the_same() -> None:
    world = World(rank=1, size=2, local_rank=1, local_size=2)
    circle, store = _Circle(world, LIMIT, PERIOD), HashStore()
    store.set("beat 0", beat(0, "optimiser", number=5).encode())
    store.set("word of rank 0", '{"number": 5, "verdict": null}')
    with Notes(store, ["word of rank 0", "beat 0"], 0.01) as notes:
        circle.notes = notes
        until(lambda: len(notes.read) == 2)
        assert circle.judge(beat(1, WAITING), 50.0) is None
        assert circle.judge(beat(1, WAITING, quiet=LIMIT), 50.0 + LIMIT - 1) is None
        verdict = circle.judge(beat(1, WAITING, quiet=LIMIT), 50.0 + LIMIT)
        assert verdict is not None
        assert verdict.line == (
            "stalled: rank 0 on n0 (process 100) has not been heard of for 900 s, last in 'optimiser'"
        )
        store.set("word of rank 0", '{"number": 6, "verdict": null}')
        until(lambda: "6" in notes.read["word of rank 0"])
        assert circle.judge(beat(1, WAITING, quiet=LIMIT), 51.0 + LIMIT) is None


def test_time_in_which_the_process_did_not_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    pulse = watchdog._Pulse(World(), longest=20.0)
    quiet = []
    moved()
    for seconds in (10.0, 10.0, 86_400.0, 10.0):  # a day in which the job was suspended
        clock[0] += seconds
        quiet.append(pulse.feel().quiet)
    assert quiet == [0.0, 10.0, 30.0, 40.0]
    moved()
    assert pulse.feel().quiet == 0.0


def test_stacks_name_threads_and_functions() -> None:
    there, over = threading.Event(), threading.Event()

    def in_a_thread_of_its_own() -> None:
        there.set()
        over.wait()

    thread = threading.Thread(target=in_a_thread_of_its_own, name="decode_7")
    thread.start()
    assert there.wait(PATIENCE)
    text = stacks(thread.ident or 0)
    over.set()
    thread.join()
    assert text.startswith("thread decode_7:\n")
    assert f"{__file__}:" in text and "in_a_thread_of_its_own\n" in text
    assert "thread MainThread" not in text  # who asks is no news


def test_what_the_kernel_says_of_a_process() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]) as process:
        assert began(process.pid) > 0
        process.send_signal(19)
        until(lambda: kernel_view(process.pid).startswith(f"process {process.pid} is T (stopped)"))
        process.kill()
    assert began(process.pid) == 0
    assert kernel_view(process.pid) == f"process {process.pid} is not there"


def test_a_compiler_at_work_gets_on() -> None:
    assert compiling(threading.get_ident()) == ()
    code = "def work(ask):\n    first = ask()\n    return first, ask()\n"
    scope: dict[str, Any] = {"__name__": "torch._inductor.scheduler"}
    exec(code, scope)
    first, second = scope["work"](lambda: compiling(threading.get_ident()))
    assert first and second and first != second


def test_the_threads_that_are_given_time_are_those_that_save(tmp_path: Path) -> None:
    names: list[str] = []
    saver = Saver(
        RunDirectory(tmp_path), keep_last=1, allowed=lambda: None,
        flush=lambda: names.append(threading.current_thread().name),
    )  # fmt: skip
    with saver:
        saver.save({"model": {}}, step=3, epoch=0)
        saver.wait()
    assert names and all(name.startswith(watchdog._SAVING) for name in names)


def test_a_collective_outlasts_the_watchdog() -> None:
    assert waiting_time(0.1) == waiting_time(15.0) == timedelta(minutes=30)
    for minutes in (20.0, 60.0, 600.0):
        assert waiting_time(minutes) >= 2 * timedelta(minutes=minutes)
    assert waiting_time(None) > timedelta(days=30)


def test_the_limit_is_checked() -> None:
    assert TrainingConfig().stall_minutes == 15.0
    with pytest.raises(ConfigurationError, match=r"training\.stall_minutes"):
        TrainingConfig(stall_minutes=0.0)


def test_no_thread_where_none_is_wanted() -> None:
    before = threading.active_count()
    with Watchdog(World(), None) as nobody, nobody.among(None):
        assert threading.active_count() == before
    with Watchdog(World(), 15.0) as somebody, somebody.among(None):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_what_a_watchdog_said_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGRIVISION_ENDINGS", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr(ending, "_spoken_for", threading.Event())
    report_ending(ExitCode.FAILED, "before")
    report_stall(f"{STALLED}rank 0 hangs")
    report_ending(ExitCode.FAILED, "lost the other ranks: connection closed")
    (said,) = read_endings(tmp_path)
    assert (said.rank, said.code, said.line) == (1, ExitCode.FAILED, f"{STALLED}rank 0 hangs")


NAMES = ("rank 0 on n1", "rank 1 on n1", "rank 2 on n2")


def ended(rank: int, code: int, line: str, traceback: str = "", at: float = 0.0) -> Ending:
    return Ending(rank=rank, code=code, line=line, traceback=traceback, time=at)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # The stopped rank says nothing, another one lost it first.
        (
            [ended(0, 1, "lost the other ranks: x", at=1), ended(2, 1, f"{STALLED}a", at=2)],
            (1, f"{STALLED}a"),
        ),
        ([ended(0, 1, f"{STALLED}b", at=3), ended(2, 1, f"{STALLED}a", at=2)], (1, f"{STALLED}a")),
        ([ended(0, 1, "KeyError", "Traceback"), ended(1, 1, f"{STALLED}a")], (1, f"{STALLED}a")),
        ([ended(0, 86, "diverged"), ended(1, 1, f"{STALLED}a")], (86, "rank 0 on n1: diverged")),
    ],
)
def test_the_batch_side_hears_whom_a_watchdog_named(
    said: list[Ending], expected: tuple[int, str]
) -> None:
    code, line = expected
    assert judge_endings(said, 137, NAMES) == Result(code=code, line=line)


def test_words_that_hang_are_not_waited_for() -> None:
    over, began_to = threading.Event(), threading.Event()

    def hang() -> None:
        began_to.set()
        over.wait()

    watchdog._within(0.01, hang)
    assert began_to.wait(PATIENCE) and not over.is_set()
    over.set()
