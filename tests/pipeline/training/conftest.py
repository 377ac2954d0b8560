"""One tiny dataset and the teams of processes, for all tests of training."""

import pytest
from training_kit import Teams, make_shards, write_images


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """60 training and 23 test images in three classes, sharded by the real stages."""
    folder = tmp_path_factory.mktemp("tiny")
    write_images(folder / "images")
    return make_shards(folder, folder / "images")


@pytest.fixture(scope="session")
def teams(tmp_path_factory):
    """teams(3) is a Team of three processes."""
    made = Teams(tmp_path_factory.mktemp("teams"), {})
    yield made
    made.close()
