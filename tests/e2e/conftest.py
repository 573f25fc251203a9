"""Clusters shared by the end-to-end tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.cluster import Cluster, wait_until


@pytest.fixture(scope="session")
def pair_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """1 prefill + 1 decode worker. For tests that leave it as they found it."""
    cluster = Cluster(tmp_path_factory.mktemp("pair") / "state", "--prefill", "1", "--decode", "1")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def square_cluster_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("square") / "state", "--prefill", "2", "--decode", "2")
    yield cluster
    cluster.stop()


@pytest.fixture
def square_cluster(square_cluster_of_session: Cluster) -> Cluster:
    """2 prefill + 2 decode workers, all ready: a test may kill some, the supervisor brings them back."""
    wait_until(lambda: square_cluster_of_session.ready(4), "four workers ready")
    return square_cluster_of_session
