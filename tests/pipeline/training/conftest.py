"""The teams of processes, for all tests of training."""

import pytest
from training_kit import Teams


@pytest.fixture(scope="session")
def teams(tmp_path_factory):
    """teams(3) is a Team of three processes."""
    made = Teams(tmp_path_factory.mktemp("teams"), {})
    yield made
    made.close()
