"""The world of one process, without a launcher."""

import subprocess
import sys

ALONE = """
import os
before = dict(os.environ)
from pipeline.training.world import enter_world
world = enter_world()
print(world.rank, world.size, world.total([2.0]), sorted(os.environ.keys() - before.keys() - {"KMP_INIT_AT_FORK"}))
"""


def test_a_process_alone_takes_no_port_and_leaves_no_variables_to_its_children(monkeypatch):
    """A port in the environment would be taken over, and found in use, by every training that a child starts."""
    monkeypatch.setenv("MASTER_PORT", "1")  # a batch system's, without a rank: it is nobody's launcher
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split(" ", 2)[:2] == ["0", "1"], done.stderr
    assert done.stdout.rstrip().endswith("[2.0] []")
