"""Ray on a cluster of two nodes, started here: the same answers, also when one of them is lost."""

import os
import signal

import numpy as np
import pytest

from proxyq import api
from proxyq.executor import Ray

ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own threads and sockets
TABLE = {"plans": 8, "eval_samples": 60, "samples": 32}


@pytest.fixture(scope="module")
def serial():
    return api.table(**TABLE).to_json()


@pytest.fixture(scope="module")
def cluster():
    """A head and one more node, of one core each, and this process connected to them."""
    from ray.cluster_utils import Cluster

    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    found.second = found.add_node(num_cpus=1)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.slow
def test_evolution_on_ray(cluster):
    settings = {"evaluations": 60, "population": 20, "samples": 32, "entries": 64}
    here, there = (
        api.evolve("digits", leaves=("W", "D", "bits"), executor=how, **settings).text()
        for how in ("serial", "ray:2")
    )
    assert here == there


@pytest.mark.slow
def test_workers_are_on_both_nodes_and_replaced_when_they_are_lost(cluster):
    def places(work):
        return [tuple(place) for _, place in work([0] * 10)]

    for _ in range(5):  # Ray spreads them as well as it can, after others have ended
        with Ray(2).session("proxyq.testing:place", {}) as work:
            processes, nodes = map(set, zip(*places(work), strict=True))
            assert len(processes) == 2 and os.getpid() not in processes
            lost = min(processes)
            os.kill(lost, signal.SIGKILL)
            found = places(work)
            assert len(found) == 10 and lost not in {process for process, _ in found}
        if len(nodes) == 2:
            return
    raise AssertionError("both workers were on one node, five times")


def test_a_node_is_lost_midway(cluster, serial):
    """Every plan measured once, whoever did it: the bytes of a run without Ray."""

    def progress(stage, done, total):
        if stage == "plans" and done >= 4 and cluster.second is not None:
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = None

    assert api.table(**TABLE, executor="ray:2", progress=progress).to_json() == serial
    assert cluster.second is None


@pytest.mark.slow
def test_pairs_when_a_node_is_lost_midway(cluster):
    """CLADO's rows on two nodes, one of which goes: the same matrix as without Ray."""
    settings = {"proxies": "clado", "bits": (2, 4), "samples": 16}
    serial = api.score("digits", **settings).of("clado")
    if cluster.second is None:
        cluster.second = cluster.add_node(num_cpus=1)

    def progress(stage, done, total):
        if stage == "rows of pairs" and done >= 4 and cluster.second is not None:
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = None

    other = api.score("digits", **settings, executor="ray:2", progress=progress).of("clado")
    assert cluster.second is None
    scale = np.abs(serial.coupling).max()
    np.testing.assert_allclose(other.coupling, serial.coupling, atol=1e-6 * scale)
