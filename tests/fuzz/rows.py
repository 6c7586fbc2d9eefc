"""JSON, JSON lines and records that a run, a job or `prepare` reads back."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from agrivision.data.shard_job import Job, ShardMaker, make_shard
from agrivision.data.sources import pairs as tables
from agrivision.data.sources.source import Read, Reference
from agrivision.data.tile import Tile
from agrivision.data.workplace import Workplace
from agrivision.ending import read_endings
from agrivision.fence import Owner, read_owner
from agrivision.inference.journal import Journal, read_records
from agrivision.monitor.metrics import keep_steps
from agrivision.rundir import RunDirectory, best_step
from launch.jobdir import VERSION, Attempt, JobDirectory, JobSpec
from tests.fuzz.harness import REFUSED, Target, answer
from tests.fuzz.mutations import Program, mutate_bytes, mutate_json, mutate_tree


def _mutate_lines(seeds: Any, program: bytes) -> bytes:
    """JSON lines: one of them as a tree, or all as bytes."""
    steps = Program(program)
    if steps.number(3) == 0:
        return mutate_bytes(seeds, program[1:])
    lines = steps.choice(seeds).split(b"\n")[:-1]
    place = steps.number(len(lines))
    lines[place] = mutate_tree(lines[place], steps)
    return b"\n".join(lines) + b"\n"


def _rows(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def owner(folder: Path) -> Target:
    """attempt.json."""
    path = folder / "attempt.json"
    mine = Owner(token="a" * 32, job="17", restart=1, step_id=2, host="node1", pid=123)
    seeds = tuple(
        json.dumps(dataclasses.asdict(each), indent=2).encode() + b"\n"
        for each in (mine, dataclasses.replace(mine, job="", restart=0))
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = read_owner(path)
        if found is not None:
            fields = dataclasses.asdict(found)
            # What a later version adds is passed over.
            assert fields.items() <= json.loads(data).items()
            assert {name: type(value) for name, value in fields.items()} == {
                name: type(value) for name, value in dataclasses.asdict(mine).items()
            }
            assert mine.follows(found, ("16",)) in (True, False)

    return Target(seeds=seeds, run=run, mutate=mutate_json)


def ending(folder: Path) -> Target:
    """How a rank ended."""
    path = folder / "rank-3.json"
    said = {"code": 2, "line": "it was so", "traceback": "", "time": 1.5}
    seeds = (json.dumps(said).encode(),)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for found in read_endings(folder):
            content = json.loads(data)
            assert (found.rank, found.code, found.line) == (3, content["code"], content["line"])
            assert (found.traceback, found.time) == (content["traceback"], float(content["time"]))
            assert type(found.code) is int and type(found.line) is str and math.isfinite(found.time)

    return Target(seeds=seeds, run=run, mutate=mutate_json)


def job(folder: Path) -> Target:
    """job.json."""
    spec = JobSpec(
        command=("train", "--run_dir", "run"), python=("python",), srun=("--mpi=none",), run_dir="run",
        cwd="there", dependents=("18",), resources={"nodes": 2, "time": None},
    )  # fmt: skip
    directory, order = JobDirectory(folder), list(json.loads(spec.to_json()))
    absent = json.loads(JobSpec(command=(), python=()).to_json())

    def run(data: bytes) -> None:
        directory.spec_file.write_bytes(data)
        found = answer(directory.spec, directory.spec_file)
        if found is not REFUSED:
            for name in ("command", "python", "srun", "dependents"):
                assert all(type(word) is str and "\0" not in word for word in getattr(found, name))
            assert found.command and found.python
            for name in ("max_attempts", "max_stalled", "signal_seconds"):
                assert type(getattr(found, name)) is int and getattr(found, name) >= 0
            assert type(found.run_dir) is str and type(found.cwd) is str
            assert type(found.resources) is dict
            said = absent | json.loads(data) | {"version": VERSION}
            # As text: a number that is none does not equal itself.
            assert json.dumps(json.loads(found.to_json())) == json.dumps({n: said[n] for n in order})

    return Target(seeds=(spec.to_json(),), run=run, mutate=mutate_json)


def attempts(folder: Path) -> Target:
    """attempts.jsonl and submissions.jsonl."""
    directory = JobDirectory(folder)
    first = Attempt(number=1, job="17", nodes=("a", "b"), tasks=2, began=1.5, from_step=0)
    ended = dataclasses.replace(first, ended=2.5, to_step=10, code=85, reason="so", decision="requeued")
    second = Attempt(number=2, job="17", nodes=("a",), tasks=1, began=3.5)
    submissions = (
        {"job": "17", "by": "launch", "time": 1.0},
        {"job": "18", "by": "successor", "after": "17"},
    )
    seeds = (_rows(*map(dataclasses.asdict, (first, ended, second))), _rows(*submissions))
    types = {
        "number": int,
        "job": str,
        "tasks": int,
        "began": (int, float),
        "reason": str,
        "decision": str,
    }

    def run(data: bytes) -> None:
        for name in ("attempts.jsonl", "submissions.jsonl"):
            (folder / name).write_bytes(data)
        found = directory.attempts()
        numbers = [attempt.number for attempt in found]
        assert numbers == sorted(set(numbers))
        for attempt in found:
            assert all(isinstance(getattr(attempt, name), kind) for name, kind in types.items())
            assert all(type(node) is str for node in attempt.nodes) and math.isfinite(attempt.began)
            for name in ("from_step", "to_step", "code"):
                assert getattr(attempt, name) is None or type(getattr(attempt, name)) is int
            assert attempt.ended is None or math.isfinite(attempt.ended)
        assert all(type(job) is str for job in directory.jobs())
        assert "18" in directory.lineage("18")
        assert directory.attempts() == found

    return Target(seeds=seeds, run=run, mutate=_mutate_lines)


def metrics(folder: Path) -> Target:
    """metrics.jsonl: evaluations, and the steps that stay."""
    run_dir = RunDirectory(folder)
    rows = [{"kind": "train", "step": step, "loss": 0.5} for step in range(1, 4)]
    rows += [
        {"kind": "evaluation", "step": 3, "miou": 0.25},
        {"kind": "evaluation", "step": 6, "miou": None},
    ]

    def run(data: bytes) -> None:
        run_dir.metrics.write_bytes(data)
        found = run_dir.evaluations()
        for step, score in found.items():
            assert type(step) is int and (score is None or 0 <= score <= 1)
        best = best_step(found)
        assert best is None or all(s is None or s <= found[best] for s in found.values())
        keep_steps(run_dir.metrics, 4)
        kept = run_dir.metrics.read_bytes()
        assert kept == b"".join(line for line in data.splitlines(keepends=True) if _stays(line, 4)) or (
            _lines_differ(data)
        )
        keep_steps(run_dir.metrics, 4)
        assert run_dir.metrics.read_bytes() == kept

    return Target(seeds=(_rows(*rows),), run=run, mutate=_mutate_lines)


def _stays(line: bytes, last: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return type(step) is int and step <= last


def _lines_differ(data: bytes) -> bool:
    """A file ends its lines at line feeds only, bytes.splitlines also elsewhere."""
    return data.splitlines(keepends=True) != [line + b"\n" for line in data.split(b"\n")[:-1]]


def journal(folder: Path) -> Target:
    """The journal of a prediction."""
    path, digest = folder / "journal", "d" * 32
    records = [b"first", b"second" * 20, b""]
    with Journal(path, digest, "here") as writing:
        for record in records:
            writing.append(record)
    good = path.read_bytes()
    huge = good[: -len(records[-1]) - 12] + struct.pack("<IQ", 2**32 - 1, 0)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = list(read_records(path, digest))
        assert found == _slowly(data, digest)
        with Journal(path, digest, "here") as again:
            assert again.count == len(found)
            again.append(b"more")
            assert list(again.records()) == [*found, b"more"]

    return Target(seeds=(good, huge), run=run)


def _slowly(data: bytes, digest: str) -> list[bytes]:
    head = f"agrivision {digest}\n".encode()
    found: list[bytes] = []
    if not data.startswith(head):
        return found
    data = data[len(head) :]
    while len(data) >= 12:
        size, checksum = struct.unpack_from("<IQ", data)
        content, data = data[12 : 12 + size], data[12 + size :]
        if len(content) != size or xxhash.xxh3_64_intdigest(content) != checksum:
            break
        found.append(content)
    return found


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Two tiles of four pixels."""

    def files(self, reference: Reference) -> Sequence[Path]:
        return []

    @contextmanager
    def reading(self) -> Iterator[Read]:
        def read(reference: Reference) -> Tile:
            image = np.full((1, 2, 2), reference.group, np.uint8)
            labels = np.array([[0x8001, 0x8002], [0x8003, 0]], np.uint16)
            files = {"image.raw": image.tobytes()}
            return Tile(key=reference.key, field="f", files=files, image=image, labels=labels)

        yield read


def note(folder: Path) -> Target:
    """What `prepare` notes of a finished shard: a wrong one never changes the statistics."""
    place = Workplace(folder / "set")
    place.own("").mkdir(parents=True)
    place.make_folders(["train"])
    maker = ShardMaker(reader=_Reader(), workplace=place, bands=("b1",), classes=2, strict=False)
    work = Job(
        split="train", name="00000", references=tuple(Reference(f"t{n}", "f", n) for n in (3, 4))
    )
    right = make_shard(maker, work)
    path = place._note("train", "00000")
    good = path.read_bytes()
    agreement = json.dumps({"plan": "x", "parts": 3}).encode()

    def run(data: bytes) -> None:
        path.write_bytes(data)
        assert make_shard(maker, work) == right
        assert path.read_bytes() == data or make_shard(maker, work) == right
        place.own("parts.json").write_bytes(data)
        agreed = place.agreement()
        assert agreed is None or (type(agreed[0]) is str and type(agreed[1]) is int)

    return Target(seeds=(good, agreement), run=run, mutate=mutate_json)


def pairs(folder: Path) -> Target:
    """The table of scenes and labels."""
    for name in ("a.tif", "b.tif", "la.tif", "lb.tif"):
        (folder / name).touch()
    path = folder / "pairs.csv"
    seeds = (
        b"scene,label,split\na.tif,la.tif,train\nb.tif,lb.tif,val\n",
        b'\xef\xbb\xbfscene, label\na.tif, la.tif\n"b.tif", lb.tif\nmissing.tif,x.vrt\n',
        b"label,scene\r\nla.tif,./a.tif\r\n/vsicurl/x,b.tif\r\n",
        b"scene,label\na.tif,la.tif,extra,extra\nb.tif\n",
        b"scene,label,scene\nhttp://x/a.tif,la.tif,b.tif\n" + b"x" * 300 + b".tif,la.tif\n",
    )

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = answer(lambda: tables.find_pairs(path), folder)
        if found is REFUSED:
            return
        usable, problems = found
        names = [pair.name for pair in usable]
        assert names == sorted(set(names))
        for pair in usable:
            assert pair.scene.is_file() and pair.label.is_file()
            assert "://" not in str(pair.scene) and not str(pair.label).startswith("/vsi")
            assert pair.scene.suffix.lower() in tables.DRIVERS
        assert all(problem.kind in ("unpaired", "format") for problem in problems)

    return Target(seeds=seeds, run=run)
