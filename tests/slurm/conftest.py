"""Clusters for tests, started once each, and tidied up after every test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agrivision.errors import BadInput
from launch.cluster import Cluster, ClusterOptions
from launch.cluster_files import find_address, find_programs
from tests.slurm.jobs import tidy
from tests.slurm.runs import Fault, References, Run

HERE = Path(__file__).parent

# On a machine of continuous integration nobody else is on the network to be afraid of.
ANY_INTERFACE = "CI" in os.environ

CONFIGURATIONS = {
    "default": ClusterOptions(any_interface=ANY_INTERFACE),
    "user-signal": ClusterOptions(any_interface=ANY_INTERFACE, preempt_send_user_signal=True),
    "no-requeue": ClusterOptions(any_interface=ANY_INTERFACE, job_requeue=False),
}

Clusters = Callable[[ClusterOptions], Cluster]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm() -> None:
    """Skips where there is no Slurm, or where it could not be had without opening it to the network."""
    try:
        find_programs()
        find_address(any_interface=ANY_INTERFACE)
    except BadInput as error:
        pytest.skip(str(error))


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose name is short enough for a cluster; those of pytest grow with the test's name."""
    with tempfile.TemporaryDirectory(prefix="agrivision-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def started() -> Iterator[dict[ClusterOptions, Cluster]]:
    """The clusters that run by now; all are stopped at the end."""
    clusters: dict[ClusterOptions, Cluster] = {}
    yield clusters
    for cluster in clusters.values():
        cluster.stop()
        shutil.rmtree(cluster.folder)


@pytest.fixture(scope="session")
def clusters(slurm: None, started: dict[ClusterOptions, Cluster]) -> Clusters:
    """Gives the cluster with certain options; it is started when it is first asked for."""

    def get(options: ClusterOptions) -> Cluster:
        if options not in started:
            folder = Path(tempfile.mkdtemp(prefix="agrivision-"))
            started[options] = Cluster.start(folder, options)
        return started[options]

    return get


@pytest.fixture(scope="session")
def cluster(clusters: Clusters) -> Cluster:
    """The cluster with the default options."""
    return clusters(CONFIGURATIONS["default"])


@pytest.fixture
def every_cluster(request: pytest.FixtureRequest, clusters: Clusters) -> Cluster:
    """The test runs on each configuration that its rows name; on all where they name none."""
    return clusters(CONFIGURATIONS[request.param])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "every_cluster" not in metafunc.fixturenames:
        return
    rows = list(metafunc.definition.iter_markers("row"))
    names = dict.fromkeys(name for row in rows for name in row.args[1:])
    # Of a row, the first cluster is enough for the plain suite; the others take as long again.
    more = [pytest.mark.faults] if rows else []
    params = [
        pytest.param(name, marks=more if place else [])
        for place, name in enumerate(names or CONFIGURATIONS)
    ]
    metafunc.parametrize("every_cluster", params, indirect=True)


@pytest.fixture(scope="session")
def references(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    """Runs of `dataset` that nothing disturbs."""
    return References(dataset, tmp_path_factory.mktemp("references"))


@pytest.fixture
def stopwatch(record_property: Callable[[str, object], None]) -> Iterator[Callable[[Run], None]]:
    """To be called with a run right before the fault; what that cost becomes figures of the test."""
    faults: list[Fault] = []
    yield lambda run: faults.append(Fault.now(run))
    for fault in faults:
        for name, value in fault.cost().items():
            record_property(name, value)


@pytest.fixture(autouse=True)
def _tidied(started: dict[ClusterOptions, Cluster]) -> Iterator[None]:
    """Every test finds its clusters idle and whole."""
    yield
    for cluster in started.values():
        tidy(cluster)
