"""Snapshots and the bytes of tensors: what is copied and written is what was there, bit for bit."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agrivision import snapshot, tensor_file
from agrivision.snapshot import Snapshot
from tests.test_checkpoint import DTYPES, NAMES, STATES, assert_same_states, raw, tensors

ALL_DTYPES = (
    *DTYPES,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def written(state: dict[str, torch.Tensor]) -> bytes:
    return b"".join(map(bytes, tensor_file.pieces(state)))


def by_the_library(state: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({key: value.clone().contiguous() for key, value in state.items()})


# The file


@settings(max_examples=200)
@given(state=st.dictionaries(NAMES | st.text(st.characters(codec="utf-8")), tensors(), max_size=6))
def test_the_bytes_are_the_librarys(state: dict[str, torch.Tensor]) -> None:
    if state:
        assert written(state) == by_the_library(state)


def test_tensors_of_all_dtypes_stand_where_the_library_puts_them() -> None:
    state = {}
    for number, dtype in enumerate(ALL_DTYPES):
        for name in (f"b{number}", f"a{number}", f"ä{number}"):
            state[name] = torch.arange(15).view(3, 5).to(dtype)
    assert written(state) == by_the_library(state)


LAYOUTS = {
    "rows": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3),
    "every other": lambda t: t[:, ::2],
    "expanded": lambda t: t[:, :1].expand(t.shape),
    "flipped": lambda t: t.flip(0)[3:],
    "none": lambda t: t[:0].contiguous(memory_format=torch.channels_last),
    "scalar": lambda t: t[1, 2, 3, 4],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 40, 1 << 20, 1 << 30])
def test_any_piece_size_gives_the_same_bytes(
    size: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "_PIECE_BYTES", size)
    tensor = LAYOUTS[layout](torch.arange(7 * 6 * 5 * 8, dtype=torch.float32).view(7, 6, 5, 8))
    assert written({"t": tensor}) == by_the_library({"t": tensor})


def test_pieces_are_small_whatever_the_tensor() -> None:
    big = torch.zeros(64, 512, 8, 8)  # 8 MiB
    for tensor in (big, big.contiguous(memory_format=torch.channels_last)):
        assert max(len(piece) for piece in tensor_file.pieces({"t": tensor})) <= 1 << 20


def test_a_dtype_that_the_format_does_not_know_is_not_written() -> None:
    with pytest.raises(KeyError, match="complex128"):
        written({"t": torch.zeros(2, dtype=torch.complex128)})


# The copy


def copied(states: dict[str, dict[str, Any]]) -> Any:
    """The states as a snapshot gives them back."""
    snapshot = Snapshot(states)
    snapshot.begin(states)
    return snapshot.finish()


@settings(max_examples=60)
@given(states=STATES, large=st.sampled_from([0, 1, 8, 100, 1 << 20]))
def test_a_copy_has_the_same_states(states: dict[str, dict[str, Any]], large: int) -> None:
    with patch.object(snapshot, "_LARGE_BYTES", large):
        found = copied(states)
    assert_same_states(found, states)
    assert list(found) == list(states)
    for name, state in states.items():
        assert list(found[name]) == list(state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 100, 8 << 20])
@pytest.mark.parametrize("large", [0, 1 << 30])
def test_any_layout_is_copied_in_pieces_of_any_size(
    large: int, size: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_PIECE_BYTES", size)
    monkeypatch.setattr(snapshot, "_LARGE_BYTES", large)
    tensor = LAYOUTS[layout](torch.randn(7, 6, 5, 8))
    assert raw(copied({"all": {"t": tensor}})["all"]["t"]) == raw(tensor)


def some_states() -> dict[str, dict[str, Any]]:
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    tied = torch.randn(5)
    return {
        "model": {"weight": weight, "bias": tied, "again": tied, "count": torch.tensor(3)},
        "progress": {"step": 3, "sums": {"loss": [1.0, 2.0]}, "none": torch.zeros(0, 2)},
    }


def values(states: Any) -> dict[str, Any]:
    tensors = {key: raw(value) for key, value in states["model"].items()}
    return tensors | {"progress": states["progress"] | {"none": None}}


def change(states: dict[str, dict[str, Any]], *names: str) -> None:
    for name in names:
        states["model"][name].add_(1)
    states["progress"]["sums"]["loss"].append(3.0)
    states["progress"]["sums"]["more"] = 1


def test_what_changes_afterwards_changes_nothing_in_the_copy() -> None:
    states = some_states()
    room = Snapshot(states)
    room.begin(states)
    found = room.finish()
    before = values(found)
    change(states, *states["model"])
    assert values(found) == before
    assert found["progress"]["sums"] == {"loss": [1.0, 2.0]}


def test_small_tensors_and_values_may_change_before_the_large_ones_are_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = some_states()
    size = states["model"]["weight"].nbytes
    room = Snapshot(states)
    for large in (size, size + 1):  # the weight is copied by `finish`; by `begin`
        monkeypatch.setattr(snapshot, "_LARGE_BYTES", large)
        states = some_states()
        before = values(states)
        room.begin(states)
        change(states, "bias", "count", *(["weight"] if large > size else []))
        before["progress"]["sums"] = {"loss": [1.0, 2.0]}
        assert values(room.finish()) == before


def test_whoever_waits_goes_on_when_all_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_LARGE_BYTES", 0)
    states, events = some_states(), []

    class Noted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            behind.start()  # nothing is copied before somebody waits for it
            return super().wait(timeout)

    copy_on_host = snapshot._copy_on_host

    def copy(pairs: Any) -> None:
        copy_on_host(pairs)
        events.extend("copied" for _ in pairs)

    room = Snapshot(states)
    room.wait()  # for nothing
    room._copied, behind = Noted(), threading.Thread(target=room.finish)
    monkeypatch.setattr(snapshot, "_copy_on_host", copy)
    room.begin(states)
    room.wait()
    events.append("waited")
    behind.join()
    assert events == ["copied"] * 5 + ["waited"]


def test_nobody_waits_for_a_copy_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_LARGE_BYTES", 0)
    states = some_states()
    room = Snapshot(states)
    room.begin(states)
    with monkeypatch.context() as broken:
        broken.setattr(snapshot, "_cut", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            room.finish()
    room.wait()
    room.begin(states)
    assert_same_states(room.finish(), states)


def test_the_memory_is_the_same_each_time_and_lies_as_the_tensors_do() -> None:
    states = some_states()
    room = Snapshot(states)
    room.begin(states)
    first = room.finish()["model"]
    states["model"]["weight"].mul_(-2)
    room.begin(states)
    again = room.finish()
    assert_same_states(again, states)
    second = again["model"]
    for key in first:
        assert first[key].data_ptr() == second[key].data_ptr()
        assert second[key].stride() == states["model"][key].stride()
    places = sorted((value.data_ptr(), value.nbytes) for value in second.values())
    assert all(begin + size <= after for (begin, size), (after, _) in pairwise(places))


CHANGES = {
    "a shape": lambda state: state | {"bias": torch.zeros(6)},
    "a dtype": lambda state: state | {"bias": torch.zeros(5, dtype=torch.float64)},
    "a layout": lambda state: state | {"weight": state["weight"].contiguous()},
    "one more": lambda state: state | {"other": torch.zeros(1)},
    "one less": lambda state: {key: value for key, value in state.items() if key != "bias"},
    "a value instead": lambda state: state | {"bias": 5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_states_do_not_fit(change: str) -> None:
    states = some_states()
    room = Snapshot(states)
    assert room.fits(states)
    assert room.fits(some_states())
    assert room.fits(states | {"progress": states["progress"] | {"step": 4, "new": "value"}})
    assert not room.fits(states | {"model": CHANGES[change](states["model"])})


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("large", [0, 2800, 1 << 30])
def test_any_number_of_threads_copies_the_same(
    large: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(snapshot, "_LARGE_BYTES", large)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    states = {"all": {str(size): torch.randn(size, 7) for size in range(200)}}
    assert_same_states(copied(states), states)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("large", [0, 50, 1 << 30])
def test_a_gpu_waits_for_the_copy_and_the_program_does_not(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_LARGE_BYTES", large)
    states = some_states()
    expected = values(states)
    states["model"] = {key: value.cuda() for key, value in states["model"].items()}
    room = Snapshot(states)
    room.begin(states)
    room.wait()  # `finish`, which waits for the device, comes later
    for value in states["model"].values():
        value.add_(1)  # on the device, after the copy
    found = room.finish()
    assert all(value.is_pinned() for value in found["model"].values())
    assert values(found) == expected
    for key, value in states["model"].items():
        assert expected[key] != raw(value.cpu())
