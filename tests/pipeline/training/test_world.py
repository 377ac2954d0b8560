"""The world of one process, without a launcher."""

import os
import signal
import socket
import subprocess
import sys
import time

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


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launched(rank: int, size: int, port: str) -> dict[str, str]:
    """The environment that torchrun gives a worker."""
    described = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return os.environ | {name: str(value) for name, value in described.items()}


LEAVING = """
import os
from pipeline.training.world import LAUNCHER_VARIABLES, enter_world, leave_launcher
leave_launcher()
world = enter_world()
print(world.rank, world.size, world.total([2.0]), [name for name in LAUNCHER_VARIABLES if name in os.environ])
"""


def test_one_worker_leaves_a_launchers_variables_alone_and_says_so():
    done = subprocess.run(
        [sys.executable, "-c", LEAVING],
        env=launched(2, 4, free_port()),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.rstrip() == "0 1 [2.0] []", done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "ignored" in line]
    assert "RANK=2, WORLD_SIZE=4, MASTER_ADDR=127.0.0.1" in line


JOINING = """
from pipeline.training import world
world._SAY_AFTER_S = 0.1
entered = world.enter_world()
print(entered.rank, entered.size, entered.total([1.0 + entered.rank]))
"""


def join(rank: int, size: int, port: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOINING]
    return subprocess.Popen(
        command, env=launched(rank, size, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_workers_that_a_launcher_started_join_its_group():
    port = free_port()
    workers = [join(rank, 2, port) for rank in range(2)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [output for output, _ in outputs] == ["0 2 [3.0]\n", "1 2 [3.0]\n"], outputs


def test_a_wait_for_workers_that_do_not_come_is_said_and_hears_signals():
    worker = join(0, 2, free_port())
    try:
        line = next(line for line in worker.stderr if "waiting" in line)
        assert "RANK=0, WORLD_SIZE=2, MASTER_ADDR=127.0.0.1" in line
        time.sleep(0.5)
        worker.send_signal(signal.SIGINT)
        assert worker.wait(timeout=20) != 0
    finally:
        worker.kill()
        worker.communicate()


WAITING = """
import sys, time
from pipeline.training.world import Unanswered, enter_world
world = enter_world(timeout_s=2)
assert world.total([1.0]) == [2.0]
if world.rank:
    time.sleep(6)
else:
    began = time.monotonic()
    try:
        world.all_gather("here")
    except Unanswered as error:
        print(error, time.monotonic() - began < 5)
"""


def test_a_worker_that_does_not_come_is_missed_after_the_timeout():
    port = free_port()
    command = [sys.executable, "-c", WAITING]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, env=launched(rank, 2, port), **pipes) for rank in range(2)]
    output, errors = workers[0].communicate(timeout=120)
    workers[1].communicate(timeout=120)
    assert output.startswith(
        "rank 0 of 2 waited 2 s in a gathering over all workers, and another one did not come. "
    ), errors
    assert output.endswith("raise resources.collective_timeout_s True\n")


LEFT = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print(dist.is_initialized()))  # the last to be called
from pipeline.training.world import enter_world
enter_world()
"""


def test_a_group_that_was_made_here_ends_with_the_process():
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "False\n", done.stderr
