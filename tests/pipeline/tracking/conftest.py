"""A database to copy."""

from pathlib import Path

import pytest

from pipeline import tracking


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory) -> Path:
    """MLflow takes seconds to make a database; tests get a copy of this one."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.check_tracking(f"sqlite:///{path}")
    return path
