"""Notes that ranks leave for one another in a store, read and written by a thread of their own.

The store lives in rank 0's process or its launcher's, and may stop to answer: whoever asks it may then
wait for ever. So only this thread asks it. Others hand in what is to be written, and look at what was
read last.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from torch.distributed import Store  # type: ignore[attr-defined]

_CLOSE_SECONDS = 5.0
_HURRY_SECONDS = 0.2


class Notes:
    """Notes by name; use it in a `with` statement.

    Args:
        store: that all ranks are connected to, on a connection that nobody else uses.
        wanted: the notes to read.
        period: seconds between two looks at the store.
    """

    def __init__(self, store: Store, wanted: Iterable[str], period: float) -> None:
        self._store, self._period = store, period
        self._wanted, self._there = list(wanted), set[str]()
        self._out: dict[str, str] = {}
        self._read: Mapping[str, str] = {}
        self._lock = threading.Lock()
        self._over, self._news = threading.Event(), threading.Event()
        self._gone = False
        self._thread = threading.Thread(target=self._run, name="notes of the ranks", daemon=True)

    def leave(self, name: str, text: str) -> None:
        """Hand in a note, which replaces the one of this name; it is written soon."""
        with self._lock:
            self._out[name] = text
        self._news.set()

    def want(self, names: Iterable[str]) -> None:
        """Read these notes, too, from now on."""
        with self._lock:
            self._wanted += names
        self._news.set()

    def hurry(self) -> None:
        """Look at the store far more often from now on: the end is near."""
        self._period = min(self._period, _HURRY_SECONDS)
        self._news.set()

    @property
    def read(self) -> Mapping[str, str]:
        """The notes as they were when they were read last."""
        return self._read

    @property
    def gone(self) -> bool:
        """Whether the store is there no more; while it merely does not answer, it is."""
        return self._gone

    def __enter__(self) -> Notes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._news.set()
        self._thread.join(_CLOSE_SECONDS)  # it may wait for a store that does not answer

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self._exchange()
            except RuntimeError:  # also what torch raises when the other end has closed
                self._gone = True
                return
            self._news.wait(self._period)
            self._news.clear()

    def _exchange(self) -> None:
        with self._lock:
            out, self._out = self._out, {}
            wanted = list(self._wanted)
        for name, text in out.items():
            self._store.set(name, text)
        # To ask for a note that is not there is to wait for it. Once there, it stays.
        self._there.update(name for name in wanted if name not in self._there and self._has(name))
        names = [name for name in wanted if name in self._there]
        if names:
            texts = self._store.multi_get(names)
            self._read = {name: text.decode() for name, text in zip(names, texts, strict=True)}

    def _has(self, name: str) -> bool:
        return bool(self._store.check([name]))
