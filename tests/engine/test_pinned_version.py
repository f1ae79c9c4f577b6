"""A checkpoint of version 0.2.0 answers as that version did.

``tests/data/version_0.2.0_affine.ckpt`` was made by commit d24bf85 from eight drawn images of
64 x 64 pixels, with default layers, 40 atoms a scale and without the backbone's weights, which are
added here. Its ``expected`` holds what that commit answered to two random images.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_sgfr import Sgfr
from tests.conftest import small

CHECKPOINT = Path(__file__).parents[1] / "data" / "version_0.2.0_affine.ckpt"


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sgfr, dict[str, Any]]:
    state = torch.load(CHECKPOINT, weights_only=True)
    expected = state.pop("expected")
    embedder = small().model.embedder
    embedder.load_pretrained()
    state["state_dict"] |= {
        f"model.embedder.{name}": value for name, value in embedder.state_dict().items()
    }
    path = tmp_path_factory.mktemp("pinned") / "model.ckpt"
    torch.save(state, path)
    return Sgfr.load_from_checkpoint(path, map_location="cpu").eval(), expected


def test_scores_and_maps_are_those_of_version_0_2(restored: tuple[Sgfr, dict[str, Any]]) -> None:
    model, expected = restored
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model.model(images)
    # to rounding, which differs between processors
    torch.testing.assert_close(found.pred_score, expected["score"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.anomaly_map[:, 0, ::8, ::8], expected["map"], rtol=1e-5, atol=1e-5
    )


def test_the_certificate_is_that_of_version_0_2(restored: tuple[Sgfr, dict[str, Any]]) -> None:
    model, expected = restored
    certificate = model.certificate()
    assert certificate.patches == expected["patches"]
    for name in ("largest", "mean", "largest_score"):
        assert float(getattr(certificate, name)) == pytest.approx(expected[name], rel=1e-5)


def test_thresholds_are_those_of_version_0_2(restored: tuple[Sgfr, dict[str, Any]]) -> None:
    model, expected = restored
    processor = model.post_processor
    assert float(processor.image_threshold) == expected["image_threshold"]
    assert float(processor.pixel_threshold) == expected["pixel_threshold"]
    assert processor.state.image == expected["raw_image_threshold"]
    assert processor.state.pixel == expected["raw_pixel_threshold"]
