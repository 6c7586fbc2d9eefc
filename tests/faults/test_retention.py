"""Whatever happens to checkpoints, in whatever order: nothing that is whole is lost for nothing.

A machine saves, damages, tidies, goes back and comes again on a node that sees the folder late, in any
order that hypothesis thinks of. A model beside it knows what was whole when.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agrivision import checkpoint
from agrivision.errors import CheckpointError
from agrivision.rundir import RunDirectory
from agrivision.training.saver import Saver


def states(step: int, attempt: int) -> dict[str, dict[str, Any]]:
    return {"progress": {"step": step, "attempt": attempt}}


class Retention(RuleBasedStateMachine):
    """A run: attempts that save, and a disk that damages.

    What is damaged is so in one of the ways that happen: a flipped bit, a cut file, no manifest, a
    manifest of another version, a file that may not be read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.checkpoints = self.folder / "checkpoints"
        self.step = self.attempt = 0
        self.damaged: set[str] = set()  # names that the test has damaged
        self.unreadable: dict[str, bytes] = {}  # those whose manifest is, and what they hold
        self.unnoticed: set[str] = set()  # those whose files are, since the attempt began
        self.hidden: list[tuple[Path, Path]] = []
        self.keep_last = 2
        self.scores: dict[int, float] = {}
        self.milestones: set[int] = set()
        self.saver = self.begin(None)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def begin(self, whole: int | None) -> Saver:
        self.attempt += 1
        self.unnoticed = set()
        run = RunDirectory(self.folder)
        return Saver(
            run,
            keep_last=self.keep_last,
            allowed=lambda: None,
            whole=whole,
            attempt=self.attempt,
        )

    @rule(milestone=st.booleans(), score=st.none() | st.floats(0, 1))
    def save(self, milestone: bool, score: float | None) -> None:
        self.step += 1
        if milestone:
            self.milestones.add(self.step)
        with self.saver as saver:
            saver.save(states(self.step, self.attempt), step=self.step, epoch=0, milestone=milestone)
        self.forget(f"step-{self.step:09d}")
        if score is not None:
            self.scores[self.step] = score
            self.write_scores()

    def write_scores(self) -> None:
        row = '{{"kind": "evaluation", "step": {}, "miou": {}}}\n'
        text = "".join(row.format(step, score) for step, score in self.scores.items())
        (self.folder / "metrics.jsonl").write_text(text)

    @precondition(lambda self: self.there())
    @rule(data=st.data(), how=st.sampled_from(["bit", "cut", "no manifest", "version", "link"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        path = data.draw(st.sampled_from(self.there()))
        if path.name in self.damaged:
            return
        file, manifest = path / "progress.json", path / checkpoint.MANIFEST
        if how == "bit":
            file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        elif how == "cut":
            file.write_bytes(file.read_bytes()[:-1])
        elif how == "no manifest":
            manifest.unlink()
        elif how == "version":
            manifest.write_bytes(manifest.read_bytes().replace(b'"version": 1', b'"version": 2'))
        else:
            file.rename(path / "elsewhere")
            file.symlink_to("elsewhere")
        self.damaged.add(path.name)
        if how in ("no manifest", "version"):
            self.unreadable[path.name] = content(path)
        else:
            self.unnoticed.add(path.name)

    def forget(self, name: str) -> None:
        """A name is free again, or of something whole."""
        self.damaged.discard(name)
        self.unnoticed.discard(name)

    @rule()
    def go_on(self) -> None:
        """Another attempt, after a kill: it goes on from the newest that is whole."""
        try:
            found = checkpoint.latest(self.checkpoints)
        except CheckpointError:
            assert all(path.name in self.damaged for path in self.there())
            assert self.there()
            shutil.rmtree(self.checkpoints)  # what the line tells the user: start again
            unseen = {path.name for path, _ in self.hidden}
            self.damaged &= unseen
            self.unreadable = {name: held for name, held in self.unreadable.items() if name in unseen}
            found = None
        self.step = 0 if found is None else found.step
        if found is not None:
            assert found.folder.name not in self.damaged
            checkpoint.set_aside(self.checkpoints, found.step)
        self.scores = {step: score for step, score in self.scores.items() if step <= self.step}
        self.milestones = {step for step in self.milestones if step <= self.step}
        self.write_scores()
        self.saver = self.begin(None if found is None else found.step)

    @precondition(lambda self: not self.hidden and len(self.there()) > 1)
    @rule()
    def look_away(self) -> None:
        """The newest is not seen on the node of the next attempt."""
        path = self.there()[-1]
        aside = self.folder / f"unseen-{path.name}"
        path.rename(aside)
        self.hidden.append((path, aside))
        self.go_on()

    @precondition(lambda self: self.hidden)
    @rule()
    def look_again(self) -> None:
        path, aside = self.hidden.pop()
        if path.exists():
            # Its name was taken meanwhile; a server would not have allowed that.
            if self.unreadable.get(path.name) == content(aside):
                del self.unreadable[path.name]
            shutil.rmtree(aside)
        else:
            path.parent.mkdir(exist_ok=True)  # the user may have started again meanwhile
            aside.rename(path)

    def there(self) -> list[Path]:
        return checkpoint.folders(self.checkpoints)

    @invariant()
    def what_is_whole_can_be_gone_on_from(self) -> None:
        whole = [path for path in self.there() if path.name not in self.damaged]
        if whole:
            found = checkpoint.latest(self.checkpoints)
            assert found is not None
            assert found.folder == whole[-1]
            assert found.states["progress"]["step"] == found.step
        elif self.there():
            with pytest.raises(CheckpointError, match="is whole"):
                checkpoint.latest(self.checkpoints)

    @invariant()
    def nothing_unreadable_is_removed(self) -> None:
        for name, held in self.unreadable.items():
            kept = [*self.checkpoints.glob(f"*{name}*"), *self.folder.glob(f"unseen-{name}")]
            assert held in map(content, kept), name


def content(folder: Path) -> bytes:
    files = sorted(path for path in folder.iterdir() if path.name != "elsewhere")
    return b"".join(
        str(path.readlink()).encode() if path.is_symlink() else path.read_bytes() for path in files
    )


class RetentionKeeps(Retention):
    """The same, and after each save what retention must keep is counted."""

    @rule()
    def save_and_count(self) -> None:
        before = {path.name for path in self.there() if path.name not in self.damaged}
        self.save(milestone=False, score=None)
        after = {path.name for path in self.there() if path.name not in self.damaged}
        assert f"step-{self.step:09d}" in after
        # That many are whole, if there ever were, but for what has changed since this attempt read it.
        counted = after | {path.name for path in self.there() if path.name in self.unnoticed}
        # What is later than this step was seen again meanwhile: another attempt's, which makes way.
        whole = {name for name in before | after if name <= f"step-{self.step:09d}"}
        assert len(counted) >= min(self.keep_last, len(whole))
        kept = {step for step in self.milestones if f"step-{step:09d}" in before}
        # What was damaged since this attempt read it still counts as whole, and as the best.
        seen = before | self.unnoticed
        scored = {s: v for s, v in self.scores.items() if f"step-{s:09d}" in seen}
        if scored:
            best = max(scored, key=lambda step: (scored[step], -step))
            kept |= {best} if f"step-{best:09d}" in before else set()
        assert {f"step-{step:09d}" for step in kept if step <= self.step} <= after


TestRetention = RetentionKeeps.TestCase
TestRetention.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
