"""Parts of one `prepare` at work in the same folder at the same time, perhaps on several nodes.

Three locks say who may do what. `lock` is held by a whole `prepare` alone, or by its parts together.
`work` is held together by the parts that make shards, and alone by one that tidies up before the first
or puts the data set together after the last. A lock for each part keeps a second process waiting, for a
while: a task that Slurm starts again may meet its own earlier process, on a node that was lost.

Which parts have made their shards stands in a log that is read and written through one open, locked
file: a network file system may show other nodes a new name half a minute late, and two last parts that
do not see one another would both leave. Nothing hangs on the log but the moment: whoever puts the data
set together looks at every shard, and makes those that it does not find whole.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from agrivision.data.workplace import Workplace
from agrivision.errors import DatasetError, Interrupted
from agrivision.locks import FileLock, Patience
from agrivision.part import Part, Stop

_POLL_SECONDS = 0.2
_BEGAN, _ENDED = "-", "+"


@dataclass(frozen=True, kw_only=True)
class Common:
    """What all parts must have in common.

    Attributes:
        workplace: where the data set grows.
        plan: digest of what the shards are made from and how.
        shards: names by split.
        busy: numbers of the parts that have shards to make.
        check_out: raises where something stands at OUT.
    """

    workplace: Workplace
    plan: str
    shards: Mapping[str, Collection[str]]
    busy: frozenset[int]
    check_out: Callable[[], None]


class Sharing:
    """A part's place among the others; made by `shared`."""

    def __init__(self, common: Common, part: Part, work: FileLock, stop: Stop) -> None:
        self._common, self._part, self._work, self._stop = common, part, work, stop

    @property
    def missing(self) -> int:
        """How many shards nobody has made yet, as far as can be seen from here."""
        return self._common.workplace.missing(self._common.shards)

    def join(self) -> None:
        """Begin to make shards, together with others that make the same data set in as many parts.

        Raises:
            DatasetError: something else is being made here.
            Interrupted: asked to stop while another part was in the way.
        """
        while True:
            if self._work.take(alone=True):
                self._check()
                self._begin()
                self._work.free()
            if self._work.take(alone=False):
                self._check()
                if self._agreed():
                    break
                self._work.free()
            self._wait()
        self._note(_BEGAN)

    def ended(self) -> bool:
        """Note that this part's shards are made; whether all are now, so that somebody has to finish.

        Without locks exactly one part is told so: the one whose note made the log complete.
        """
        completed_by = completing(self._note(_ENDED), self._common.busy)
        if not self._work.known:
            return completed_by == self._part.number
        return completed_by is not None or self.missing == 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the folder alone, after all others have left it.

        Raises:
            Interrupted: asked to stop before that.
        """
        self._work.free()
        while not self._work.take(alone=True):
            self._wait()
        self._check()
        yield

    def _begin(self) -> None:
        """Agree on what is made here, and tidy up; without locks others may be at work: then not."""
        workplace, common = self._common.workplace, self._common
        found = workplace.agreement()
        if found is not None and found[0] != common.plan:
            raise DatasetError(
                f"{workplace.folder} is being made from another source or with other options: give the"
                " same to every part, or remove it to begin anew"
            )
        if found != (common.plan, self._part.of):
            workplace.agree(common.plan, self._part.of)
        if self._work.known:
            workplace.tidy(common.shards)
        else:
            workplace.make_folders(common.shards)

    def _agreed(self) -> bool:
        """Whether everybody here makes the same; False where nobody has said yet what."""
        found = self._common.workplace.agreement()
        if found is None:
            return False
        if found[0] != self._common.plan:
            raise DatasetError(
                f"other parts make {self._common.workplace.out} from another source or with other"
                " options: give the same to every part"
            )
        if found[1] != self._part.of:
            raise DatasetError(
                f"{self._common.workplace.out} is being made in {found[1]} parts, not in"
                f" {self._part.of}: wait for them, or give the same number"
            )
        return True

    def _check(self) -> None:
        self._common.check_out()
        if not self._work.in_place:
            folder = self._common.workplace.folder
            raise DatasetError(f"{folder} was removed by somebody: run it again")

    def _wait(self) -> None:
        self._common.check_out()
        if self._stop():
            raise Interrupted("stopped while waiting for another part: the same command goes on")
        time.sleep(_POLL_SECONDS)

    def _note(self, mark: str) -> list[str]:
        """Write into the log; returns all its lines, this one last."""
        with FileLock(self._common.workplace.log) as log:
            while not log.take(alone=True):
                self._wait()
            log.append(f"{mark}{self._part.number}\n".encode())
            log.sync()
            return log.read().decode("ascii", "replace").splitlines()


def completing(lines: Collection[str], wanted: Collection[int]) -> int | None:
    """The part whose line made the log of beginnings and endings complete; None where it is not.

    Args:
        lines: `-3` where part 3 began, `+3` where its shards were made; any others do not count.
        wanted: the parts that have to end.
    """
    ended: set[int] = set()
    completed_by = None
    for line in lines:
        if not re.fullmatch(r"[+-][0-9]+", line):
            continue
        number = int(line[1:])
        if line[0] == _BEGAN:
            ended.discard(number)
        else:
            ended.add(number)
        if not ended.issuperset(wanted):
            completed_by = None
        elif completed_by is None:
            completed_by = number
    return completed_by


@contextmanager
def shared(common: Common, part: Part, stop: Stop) -> Iterator[Sharing]:
    """Be one of the parts that make a data set together.

    Raises:
        Busy: a whole `prepare` or the same part is at work already, and stays.
        DatasetError: other parts make something else.
        Interrupted: asked to stop while another process was in the way.
        StorageError, NotWritable: the disk refused.
    """
    workplace = common.workplace
    whole = Patience(f"another `prepare` is at work on {workplace.out}", stop)
    same = Patience(f"another process makes part {part} of {workplace.out}", stop)
    with ExitStack() as stack:
        lock = stack.enter_context(workplace.lock())
        while not lock.take(alone=False):
            _wait_outside(common, whole)
        own = stack.enter_context(FileLock(workplace.own(f"part-{part.number}-of-{part.of}.lock")))
        while not own.take(alone=True):
            _wait_outside(common, same)
        work = stack.enter_context(FileLock(workplace.own("work")))
        sharing = Sharing(common, part, work, stop)
        sharing.join()
        yield sharing


def _wait_outside(common: Common, patience: Patience) -> None:
    """Wait a moment, unless the other process has meanwhile finished the data set."""
    common.check_out()
    patience.wait()
