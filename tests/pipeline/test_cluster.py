"""This machine's own cluster."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cluster

TWICE = """
from pipeline import cluster
for _ in range(2):
    cluster.connect(cpus=1)
    print(cluster.map_tasks(abs, [-3, 2], executor="ray"))
    cluster.disconnect()
"""


@pytest.mark.system
def test_a_process_may_start_a_cluster_more_than_once():
    """Ray's client remembers its first token, so the second cluster must have the same."""
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False, timeout=180)
    assert done.stdout.splitlines() == ["[3, 2]", "[3, 2]"], done.stderr


def test_drivers_and_nodes_notice_a_lost_node_equally_soon():
    """Every process of a cluster needs the same: drivers have them from the code, `ray start` from the file."""
    lines = (Path(__file__).parents[2] / "infra/ray/ray.env").read_text().splitlines()
    written = dict(line.split("=") for line in lines if line and not line.startswith("#"))
    assert {name: written.get(name) for name in cluster.NODE_LOSS} == cluster.NODE_LOSS
    assert len(cluster.NODE_LOSS) == 9
