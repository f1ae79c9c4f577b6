"""Pre-processing: what is exported resizes as the Engine does."""

from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torchvision.transforms.v2 import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    RandomRotation,
    Resize,
)

from anomalib_sgfr import Sgfr
from anomalib_sgfr.images.pre_processor import SgfrPreProcessor, geometric_steps
from anomalib_sgfr.images.resizing import ExactResize, resize_matrix


@pytest.mark.parametrize(
    ("before", "after"),
    [(300, 256), (1024, 256), (257, 256), (64, 256), (256, 256), (5, 2), (1, 3)],
)
def test_resizing_is_antialiased_interpolation(before: int, after: int) -> None:
    line = torch.rand(1, 1, before, 4)
    expected = functional.interpolate(line, size=(after, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(resize_matrix(before, after) @ line, expected, atol=2e-6, rtol=0)


# image, weights and both products have 8 bits each; an error of half a pixel is above 0.03
ROUNDING = 0.02

SIZES = [(256, 256), (300, 300), (411, 389), (97, 800), (1500, 2000), (3, 5)]


class _Rounded(TorchDispatchMode):
    """Rounds the results of every operation to bfloat16, as a runtime that computes in it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        return tree_map_only(
            torch.Tensor,
            lambda part: part.bfloat16().float() if part.is_floating_point() else part,
            found,
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("after", [(256, 256), (97, 301)])
def test_resizing_stands_bfloat16(size: tuple[int, int], after: tuple[int, int]) -> None:
    images = (torch.rand(1, 3, *size) > 0.5).float()
    expected = functional.interpolate(images, after, mode="bilinear", antialias=True)
    with _Rounded():
        found = ExactResize(after)(images)
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


@pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="needs bfloat16",
)
def test_an_exported_pre_processor_stands_bfloat16(tmp_path: Path) -> None:
    processor = SgfrPreProcessor(
        Compose([Resize((256, 256), antialias=True), CenterCrop((224, 200))])
    ).eval()
    free = {
        axis: torch.export.Dim(name) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))
    }
    file = tmp_path / "resize.onnx"
    images = torch.rand(2, 3, 300, 280)
    torch.onnx.export(
        processor, (images,), str(file), dynamo=True, dynamic_shapes=(free,), verbose=False
    )
    for hint, tolerance in (("f32", 1e-6), ("bf16", ROUNDING)):
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        for size in SIZES:
            images = (torch.rand(1, 3, *size) > 0.5).float()
            found = torch.from_numpy(next(iter(compiled(images.numpy()).values())))
            torch.testing.assert_close(found, processor.transform(images), atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [(300, 300), (411, 389), (100, 700)])
def test_the_exported_transform_is_the_engines(size: tuple[int, int]) -> None:
    processor = Sgfr.configure_pre_processor((128, 96))
    images = torch.rand(2, 3, *size)
    torch.testing.assert_close(processor(images), processor.transform(images), atol=1e-5, rtol=0)


def test_a_checkpoint_brings_exact_resizing_back() -> None:
    processor = Sgfr.configure_pre_processor((128, 96))
    restored = SgfrPreProcessor()
    restored.load_checkpoint_config(processor.checkpoint_config())
    assert isinstance(restored.export_transform.transforms[0], ExactResize)
    images = torch.rand(1, 3, 300, 200)
    torch.testing.assert_close(restored(images), processor(images))


@pytest.mark.parametrize(
    "transform",
    [
        None,
        Resize(64),
        Resize((64, 64), interpolation=InterpolationMode.BICUBIC),
        Compose([CenterCrop(32), Normalize([0.5] * 3, [0.5] * 3)]),
        Resize((64, 64), antialias=True),
    ],
)
def test_other_transforms_are_left_to_anomalib(transform: object) -> None:
    processor = SgfrPreProcessor(transform)
    exact = (
        isinstance(transform, Resize)
        and len(transform.size) == 2
        and "bilinear" in str(transform.interpolation).lower()
    )
    assert isinstance(processor.export_transform, ExactResize) == exact
    assert processor(torch.rand(1, 3, 80, 80)).shape[0] == 1


def test_a_transform_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="RandomRotation moves pixels in a way that cannot be"):
        geometric_steps(Compose([Resize((64, 64)), RandomRotation(10)]))
