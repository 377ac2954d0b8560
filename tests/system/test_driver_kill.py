"""A driver killed with SIGKILL at random moments, 20 times over, in this process and on Ray: it always ends in the same results."""

import sys
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "graph"))
from graph_drivers import check_like_undisturbed, kill_and_go_on, left_behind, results, walk_to_the_end

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    walk_to_the_end(folder, tick_s=0)
    return results(folder)


@pytest.mark.parametrize("seed", range(100, 116))
def test_killed_in_process(seed, undisturbed, tmp_path):
    kills = kill_and_go_on(tmp_path, seed=seed, tick_s=0.04, span_s=0.8, executor="in_process")
    check_like_undisturbed(tmp_path, undisturbed, kills=kills)


@pytest.mark.parametrize("seed", range(200, 204))
def test_killed_on_ray(seed, undisturbed, tmp_path):
    mark = uuid.uuid4().hex
    try:
        kills = kill_and_go_on(tmp_path, seed=seed, tick_s=0.2, span_s=8.0, executor="ray", mark=mark)
        check_like_undisturbed(tmp_path, undisturbed, kills=kills)
    finally:
        left = left_behind(mark, within_s=30)
    # What runs steps or could start them ends with the driver. Ray's agents ask now and then whether the raylet lives, and
    # take one that nobody has reaped yet for alive: `left_behind` has ended them.
    assert [command for command in left.values() if "Agent" not in command] == []
