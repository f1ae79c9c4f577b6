"""A fit that breaks off leaves the last good checkpoint as it was, and nothing half-written beside
it.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from anomalib.engine import Engine

from anomalib_sgfr import Sgfr
from tests.conftest import folder_datamodule


@pytest.fixture(scope="module")
def good(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a fit that ended well."""
    out = tmp_path_factory.mktemp("interrupted")
    model = Sgfr(
        bank_size=150,
        seed=0,
        visualizer=False,
        pre_processor=Sgfr.configure_pre_processor((64, 64)),
    )
    engine = Engine(accelerator="cpu", default_root_dir=out)
    engine.fit(model, datamodule=folder_datamodule(parts))
    return Path(str(engine.best_model_path))


@pytest.mark.skipif(os.name != "posix", reason="signals and file limits of POSIX")
@pytest.mark.parametrize(
    ("how", "says", "status"),
    [
        ("SIGINT", "KeyboardInterrupt", 1),
        ("SIGTERM", "SIGTERM", 0),
        ("SIGKILL", "", -signal.SIGKILL),
        ("full", "File too large", 1),
        ("cut", "", -signal.SIGXFSZ),
    ],
)
def test_the_last_good_checkpoint_survives(
    good: Path, parts: Path, warm: Path, how: str, says: str, status: int
) -> None:
    out = good.parents[5]
    before = good.read_bytes()
    broken = subprocess.run(
        [warm / "script", Path(__file__).with_name("interrupted_fit.py"), parts, out, good, how],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "as if nothing had happened" not in broken.stdout
    assert says in broken.stderr
    assert broken.returncode == status
    assert good.read_bytes() == before
    assert [path for path in out.rglob("*.ckpt") if not path.parent.is_symlink()] == [good]

    model = Sgfr.load_from_checkpoint(good, visualizer=False)
    engine = Engine(accelerator="cpu", default_root_dir=out, logger=False)
    datamodule = folder_datamodule(parts)
    (metrics,) = engine.test(model, datamodule=datamodule)
    assert metrics["image_AUROC"] == 1.0


def test_new_images_are_added_after_an_interruption(good: Path, parts: Path) -> None:
    """The next run simply works."""
    model = Sgfr(
        bank_size=150,
        update=True,
        visualizer=False,
        pre_processor=Sgfr.configure_pre_processor((64, 64)),
    )
    engine = Engine(accelerator="cpu", default_root_dir=good.parents[5], logger=False)
    engine.fit(model, datamodule=folder_datamodule(parts), ckpt_path=str(good))
    assert model.certificate().patches == 2 * 12 * (2 * 8 * 8 + 4 * 4 + 2 * 2)
