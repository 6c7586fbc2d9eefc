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


@pytest.fixture(params=CONFIGURATIONS)
def every_cluster(request: pytest.FixtureRequest, clusters: Clusters) -> Cluster:
    """The test runs on each configuration: default, user-signal, no-requeue."""
    return clusters(CONFIGURATIONS[request.param])


@pytest.fixture(autouse=True)
def _tidied(started: dict[ClusterOptions, Cluster]) -> Iterator[None]:
    """Every test finds its clusters idle and whole."""
    yield
    for cluster in started.values():
        tidy(cluster)
