"""What several files of these tests start from."""

from pathlib import Path

import pytest

from tests.conftest import engine_in, folder_datamodule, small


@pytest.fixture(scope="session")
def checkpoint(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a small model that was fitted to ``parts``."""
    engine = engine_in(tmp_path_factory.mktemp("fitted"))
    engine.fit(small(), datamodule=folder_datamodule(parts))
    return Path(engine.best_model_path)
