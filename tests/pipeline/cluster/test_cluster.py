"""Clusters that `connect` starts on this machine."""

import subprocess
import sys

import pytest

TWICE = """
from pipeline import cluster
for _ in range(2):
    cluster.connect(cpus=1)
    print(cluster.map_tasks(abs, [-3, 2], executor="ray"))
    cluster.disconnect()
"""


@pytest.mark.system
def test_a_process_may_start_a_cluster_more_than_once():
    """Ray's client keeps using its first token, so the second cluster must accept it."""
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False, timeout=180)
    assert done.stdout.splitlines() == ["[3, 2]", "[3, 2]"], done.stderr
