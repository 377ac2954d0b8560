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


def test_a_single_process_opens_no_port_and_sets_no_variables_for_its_children(monkeypatch):
    """Every training in a child process would take over a port in the environment, and find it in use."""
    monkeypatch.setenv("MASTER_PORT", "1")  # a batch system may set it; without a rank there is no launcher
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split(" ", 2)[:2] == ["0", "1"], done.stderr
    assert done.stdout.rstrip().endswith("[2.0] []")
