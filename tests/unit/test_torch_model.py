"""The torch model: from images to map and score."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from anomalib.data.utils.tiler import Tiler
from anomalib.models.components import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from anomalib_sgfr.core import chunks as loops
from anomalib_sgfr.core.patch_grid import tile_spans, to_patches
from anomalib_sgfr.core.self_expression import affine, omp, ridge, ridge_operator
from anomalib_sgfr.core.solvers import AffineSolver
from anomalib_sgfr.features import tiling
from anomalib_sgfr.features.embedding import Copies
from anomalib_sgfr.features.layers import build_scales
from anomalib_sgfr.memory_bank import residual_maps
from anomalib_sgfr.torch_model import SgfrModel

LAYERS = ["layer2", "layer3"]


class Coordinates(nn.Module):
    """Stands for an embedder: the image, one value in eight, and one in sixteen."""

    scale_strides = (8, 16)
    scales = build_scales(scale_strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images[:, :, ::8, ::8], images[:, :, ::16, ::16]]


def coordinate_images(batch: int, height: int, width: int) -> Tensor:
    """Channels: image number, row, column."""
    grid = torch.meshgrid(
        torch.arange(batch), torch.arange(height), torch.arange(width), indexing="ij"
    )
    return torch.stack(grid, 1).float()


def fitted(
    solver: str = "affine",
    blur: float = 0.0,
    layers: Sequence[str] | None = LAYERS,
    **arguments: object,
) -> SgfrModel:
    model = SgfrModel("resnet18", layers, solver=solver, blur=blur, **arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        embeddings = model.train()(torch.randn(2, 3, 64, 64))
    for bank, embedding in zip(model.banks, embeddings, strict=True):
        bank.set(to_patches(embedding)[::3])
    return model.eval()


def test_patches_are_in_reading_order() -> None:
    model = SgfrModel("resnet18")
    model.embedder = Coordinates()
    expected = coordinate_images(2, 64, 32)[:, :, ::8, ::8].permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(to_patches(model.train()(coordinate_images(2, 64, 32))[0]), expected)


def test_tiles_are_stitched_where_they_came_from() -> None:
    model = SgfrModel("resnet18").train()
    model.embedder = Coordinates()
    images = coordinate_images(2, 128, 192)
    plain = model(images)
    model.tiler = Tiler(tile_size=64, stride=64)
    assert [part.shape[2:] for part in plain] == [(16, 24), (8, 12)]
    assert all(map(torch.equal, model(images), plain))


@pytest.mark.parametrize("size", [(132, 132), (100, 200), (64, 65), (192, 130)])
@pytest.mark.parametrize("step", [64, 32, 16])
def test_tiles_of_any_image_lie_where_its_own_patches_lie(size: tuple[int, int], step: int) -> None:
    model = SgfrModel("resnet18").train()
    model.embedder = Coordinates()
    images = coordinate_images(2, *size)
    plain = model(images)
    model.tiler = Tiler(tile_size=64, stride=step)
    for found, expected in zip(model(images), plain, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("place", "size"),
    [((307, 307), (384, 384)), ((240, 100), (300, 300)), ((118, 500), (320, 640))],
)
@pytest.mark.parametrize("step", [256, 128])
def test_a_defect_in_tiles_is_found_where_it_is(
    place: tuple[int, int], size: tuple[int, int], step: int
) -> None:
    model = fitted(blur=2.0)
    images = torch.zeros(1, 3, *size)
    model.tiler = Tiler(tile_size=256, stride=step)
    with torch.no_grad():
        for bank, embedding in zip(model.banks, model.train()(images), strict=True):
            bank.set(to_patches(embedding).unique(dim=0))
        model.eval()
        images[:, :, place[0] - 12 : place[0] + 12, place[1] - 12 : place[1] + 12] = 3.0
        found = model(images).anomaly_map[0, 0]
    row, column = divmod(int(found.argmax()), size[1])
    assert abs(row - place[0]) <= 16
    assert abs(column - place[1]) <= 16


class Brightness(nn.Module):
    """Stands for an embedder: mean and spread of each patch."""

    scale_strides = (8, 16)
    scales = build_scales(scale_strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        both = torch.cat((images, images.square()), 1)
        return [
            functional.avg_pool2d(both, stride, ceil_mode=True) for stride in self.scale_strides
        ]


_TILES = [(64, 64), (128, 48), ((256, 80), (160, 64)), (128, 128), (512, 256), (1024, 1024)]


def test_a_maps_peak_is_in_the_defect_at_every_size_and_tile() -> None:
    model = SgfrModel("resnet18", LAYERS, blur=2.0).eval()
    model.embedder = Brightness()
    for bank in model.banks:
        bank.set(torch.rand(8, 2) * 0.01)
    rng = np.random.default_rng(0)
    for number, height in enumerate(range(256, 641, 4)):
        width = 256 + 4 * int(rng.integers(97)) if number % 2 else height
        top, left = (int(rng.integers(0, length - 24)) for length in (height, width))
        image = torch.zeros(1, 1, height, width)
        image[..., top : top + 24, left : left + 24] = 1.0
        model.tiler = Tiler(*_TILES[number % len(_TILES)])
        found = model(image).anomaly_map[0, 0]
        row, column = divmod(int(found.argmax()), width)
        assert found.shape == (height, width)
        assert top <= row < top + 24, (height, width, top, row, model.tiler.tile_size_h)
        assert left <= column < left + 24


@pytest.mark.parametrize(
    ("backbone", "tile", "step", "stride", "apart"),
    [
        ("resnet18", 128, 128, 0, 44),
        ("resnet18", 128, 128, 1, 84),
        ("resnet18", 256, 128, 1, 0),  # overlap of more than twice that
        ("tf_efficientnet_lite0", 192, 192, 0, 60),
    ],
)
def test_tiles_are_exact_away_from_where_they_join(
    backbone: str, tile: int, step: int, stride: int, apart: int
) -> None:
    model = SgfrModel(backbone)
    images = torch.randn(1, 3, 384, 384)
    plain = model.embed(images)[stride]
    model.tiler = Tiler(tile, step)
    found = model.embed(images)[stride]
    pixels = model.embedder.scale_strides[stride]
    joins = [slot.start + slot.first * pixels for slot in tile_spans(384, tile, step, pixels)[1:]]
    centres = torch.arange(len(plain[0, 0])) * pixels + pixels / 2
    far = torch.stack([(centres - join).abs() >= apart for join in joins]).all(0)
    assert far.any()
    assert apart == 0 or not torch.allclose(found, plain)
    torch.testing.assert_close(
        found[..., far, :][..., far], plain[..., far, :][..., far], rtol=1e-4, atol=1e-4
    )


def test_a_tile_larger_than_the_image_is_the_image() -> None:
    model = fitted(blur=4.0)
    images = torch.randn(2, 3, 70, 61)
    expected = model(images).anomaly_map
    model.tiler = Tiler(128, 64)
    assert torch.equal(model(images).anomaly_map, expected)
    wide = torch.randn(1, 3, 64, 256)  # along one axis alone
    assert model(wide).anomaly_map.shape == (1, 1, 64, 256)


def test_tiles_are_embedded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted()
    model.tiler = Tiler(64, 32)
    images = torch.randn(2, 3, 192, 224)
    whole = model(images).anomaly_map
    seen: list[int] = []
    model.embedder.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel() // 3))
    monkeypatch.setattr(tiling, "_TILED_PIXELS", 3 * 2 * 64 * 64)
    torch.testing.assert_close(model(images).anomaly_map, whole)
    assert max(seen) == 3 * 2 * 64 * 64
    assert sum(seen) == 5 * 6 * 2 * 64 * 64


@pytest.mark.parametrize("size", [(16, 16), (1, 1), (9, 40), (3, 2)])
def test_small_images_are_scored(size: tuple[int, int]) -> None:
    model = fitted(blur=4.0)
    images = torch.randn(2, 3, *size)
    found = model(images).anomaly_map
    assert found.shape == (2, 1, *size)
    rough = torch.zeros_like(found)
    for part in model.score_maps(images).residuals:
        rough += functional.interpolate(part, size=size, mode="bilinear", align_corners=False)
    expected = scipy.ndimage.gaussian_filter(
        rough.numpy(), 4.0, mode="mirror", radius=16, axes=(2, 3)
    )
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.anomaly_map_generator.blur(rough), found)


def inside_of(size: tuple[int, int]) -> Tensor:
    region = torch.zeros(size, dtype=torch.uint8)
    region[20:90, 13:70] = 1
    return region


@pytest.mark.parametrize("tiled", [False, True])
def test_nothing_outside_the_region_matters(tiled: bool) -> None:
    model = fitted(blur=4.0)
    model.tiler = Tiler(64, 48) if tiled else None
    model.region = inside_of((128, 100))
    images = torch.randn(2, 3, 128, 100)
    found = model(images)
    assert float(found.pred_score.min()) > 0
    assert bool((found.anomaly_map[..., model.region == 0] == 0).all())
    assert bool((found.anomaly_map[..., model.region == 1] > 0).all())
    changed = torch.where(model.region > 0, images, torch.full_like(images, torch.nan))
    assert torch.equal(model(changed).anomaly_map, found.anomaly_map)
    images[:, :, 50, 40] += 5.0  # inside
    assert not torch.equal(model(images).anomaly_map, found.anomaly_map)


def test_a_regions_map_is_the_mean_over_the_patches_inside() -> None:
    model = fitted(blur=3.0)
    model.region = inside_of((96, 80))
    embeddings = model.embed(torch.randn(1, 3, 96, 80))
    expected = torch.zeros(1, 1, 96, 80)
    for bank, part, stride in zip(model.banks, embeddings, (8, 16), strict=True):
        mask = functional.max_pool2d(model.region[None, None].float(), stride, ceil_mode=True)
        residual = residual_maps([bank], [part])[0]
        spread = [
            model.anomaly_map_generator.blur(
                functional.interpolate(each, size=(96, 80), mode="bilinear", align_corners=False)
            )
            for each in (residual * mask, mask)
        ]
        expected += spread[0] / spread[1].clamp_min(1e-12)
    found = model.score_embeddings(embeddings, (96, 80)).anomaly_map
    torch.testing.assert_close(found, expected * model.region)


def test_images_of_another_shape_than_the_regions_are_refused() -> None:
    model = fitted()
    model.region = inside_of((128, 100))
    with pytest.raises(
        ValueError,
        match="region of interest is 128 x 100 pixels, the image 64 x 64: images must be",
    ):
        model(torch.randn(1, 3, 64, 64))


def test_a_state_of_before_regions_is_read() -> None:
    model = fitted()
    state = {name: value for name, value in model.state_dict().items() if name != "region"}
    model.load_state_dict(state)
    assert not model.region.numel()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tile_size": 100, "stride": 100},
            r"tile_size must be a multiple of 16.*\(96, 96\) would do",
        ),
        ({"tile_size": 64, "stride": 40}, r"stride must be a multiple of 16.*\(32, 32\) would do"),
        (
            {"tile_size": 64, "stride": 64, "remove_border_count": 2},
            "remove_border_count must be 0",
        ),
    ],
)
def test_tiles_that_cannot_be_right_are_refused(arguments: dict[str, int], message: str) -> None:
    model = SgfrModel("resnet18", LAYERS)
    model.tiler = Tiler(**arguments)
    with pytest.raises(ValueError, match=message):
        model.embed(torch.randn(1, 3, 128, 128))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_scores_with_the_same_banks(dtype: torch.dtype) -> None:
    model = fitted(blur=4.0)
    images = torch.randn(2, 3, 64, 64)
    expected = model(images).anomaly_map
    banks = [bank.atoms for bank in model.banks]
    model.to(dtype)
    with torch.no_grad():
        found = model(images.to(dtype)).anomaly_map
    assert found.dtype == torch.float32
    assert all(map(torch.equal, banks, (bank.atoms for bank in model.banks)))
    # what differs is the backbone's own precision
    assert float((found - expected).abs().mean() / expected.mean()) < 0.05


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
def test_the_map_is_the_sum_of_the_scales_residuals(solver: str) -> None:
    model = fitted(solver, num_atoms=4, regularisation=0.01)
    images = torch.randn(3, 3, 64, 96)
    result = model(images)
    expected = torch.zeros(3, 1, 64, 96)
    for bank, embedding in zip(model.banks, model.embedder(images), strict=True):
        patches = to_patches(embedding)
        residual = {
            "affine": affine(patches, bank.atoms, 4, 0.01).residual,
            "omp": omp(patches, bank.atoms, 4).residual,
            "ridge": ridge(patches, ridge_operator(bank.atoms, 0.01)),
        }[solver]
        coarse = residual.norm(dim=1).reshape(3, 1, *embedding.shape[2:]) / bank.residual_scale
        expected += functional.interpolate(
            coarse, size=(64, 96), mode="bilinear", align_corners=False
        )
    torch.testing.assert_close(result.anomaly_map, expected)
    torch.testing.assert_close(result.pred_score, result.anomaly_map.amax((1, 2, 3)))
    assert result.anomaly_map.shape == (3, 1, 64, 96)


def test_map_and_score_have_layers_of_their_own() -> None:
    """Against models of the same banks of one layer each."""
    torch.manual_seed(0)
    whole = fitted(layers=None, blur=4.0)
    images = torch.randn(3, 3, 64, 96)
    embeddings = whole.embed(images)
    alone = {}
    for bank, scale, embedding in zip(whole.banks, whole.embedder.scales, embeddings, strict=True):
        coarse = (
            bank.residuals(to_patches(embedding)).reshape(3, 1, *embedding.shape[2:])
            / bank.residual_scale
        )
        spread = functional.interpolate(coarse, size=(64, 96), mode="bilinear", align_corners=False)
        alone[whole.embedder.layers[scale.layer_indices[0]]] = GaussianBlur2d(sigma=4.0)(spread)
    maps = whole.score_maps(images)
    torch.testing.assert_close(
        maps.anomaly_map, alone["layer1"] + alone["layer2"] + alone["layer3"]
    )
    deep = alone["layer2"] + alone["layer3"] + alone["layer4"]
    torch.testing.assert_close(maps.score_map, 0.25 * alone["layer1"] + deep)
    found = whole(images)
    torch.testing.assert_close(found.pred_score, maps.score_map.amax((1, 2, 3)))
    for number, (row, column) in enumerate(maps.peak.tolist()):
        assert maps.score_map[number, 0, row, column] == found.pred_score[number]
    certificate = whole.certificate()
    of_bank = [bank.certificate() for bank in whole.banks]
    assert certificate.largest == pytest.approx(sum(part.largest for part in of_bank[:3]))
    assert certificate.largest_score == pytest.approx(
        sum(part.largest for part in of_bank[1:]) + 0.25 * of_bank[0].largest
    )


def test_scales_of_any_length_weigh_alike() -> None:
    """What is left of a scale counts by what is left of nominal patches of it, whatever the length
    of its features.
    """
    model = fitted(layers=None, blur=4.0)
    images = torch.randn(2, 3, 64, 64)
    embeddings = model.embed(images)
    expected = model.score_embeddings(embeddings, (64, 64))
    longer = model.with_banks(model.fitted_state)
    factors = (8.0, 0.25, 2.0, 64.0)
    for bank, factor in zip(longer.banks, factors, strict=True):
        bank.set(factor * bank.atoms)
    scaled = [factor * part for factor, part in zip(factors, embeddings, strict=True)]
    found = longer.score_embeddings(scaled, (64, 64))
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map)
    torch.testing.assert_close(found.pred_score, expected.pred_score)


def test_nominal_patches_of_the_bank_score_zero_and_others_do_not() -> None:
    model = SgfrModel("resnet18", LAYERS, blur=0.0, regularisation=0.0)
    images = torch.randn(1, 3, 64, 64)
    for bank, embedding in zip(model.banks, model.train()(images), strict=True):
        bank.set(to_patches(embedding))
    model.eval()
    # atoms are kept in 16 bits, and the certificate knows how far that moved them
    assert model(images).pred_score <= model.certificate().largest < 0.02
    assert model(torch.randn(1, 3, 64, 64)).pred_score > 0.1


def test_blur_smooths_the_map() -> None:
    torch.manual_seed(0)
    rough = fitted()
    torch.manual_seed(0)
    smooth = fitted(blur=4.0)
    images = torch.randn(1, 3, 64, 64)
    assert smooth(images).anomaly_map.std() < rough(images).anomaly_map.std()
    assert smooth(images).anomaly_map.shape == (1, 1, 64, 64)


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
def test_chunks_do_not_change_the_result(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted(solver)
    images = torch.randn(2, 3, 64, 64)
    whole = model(images)
    monkeypatch.setattr(
        loops, "_CHUNK_VALUES", 7 * (len(model.banks[0].atoms) + 4 * 5 * 128)
    )  # 7 patches a chunk
    torch.testing.assert_close(model(images).anomaly_map, whole.anomaly_map)


def test_mixed_precision_does_not_blur_the_residual() -> None:
    model = fitted()
    embeddings = model.embed(torch.randn(2, 3, 64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_autocast = model.score_embeddings(embeddings, (64, 64)).anomaly_map
    assert torch.equal(in_autocast, model.score_embeddings(embeddings, (64, 64)).anomaly_map)


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
def test_state_dict_restores_scores_bit_for_bit(solver: str) -> None:
    model = fitted(solver)
    restored = SgfrModel("resnet18", LAYERS, solver=solver, blur=0.0).eval()
    restored.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images).anomaly_map, restored(images).anomaly_map)
    smaller = fitted(solver)
    smaller.banks[0].set(model.banks[0].atoms[:3])
    restored.load_state_dict(smaller.state_dict())  # and over a bank of another size
    assert restored.banks[0].atoms.shape == (3, 128)


def test_a_pickle_holds_the_bank_once_and_scores_alike(tmp_path: Path) -> None:
    model = fitted()
    for bank, width in zip(model.banks, (128, 256), strict=True):
        bank.set(torch.randn(4000, width))
    images = torch.randn(1, 3, 64, 64)
    expected = model(images).anomaly_map
    torch.save(model, tmp_path / "model.pt")
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert (tmp_path / "model.pt").stat().st_size < state + 500_000
    for restored in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert torch.equal(restored(images).anomaly_map, expected)


def test_scoring_without_a_bank_is_refused() -> None:
    with pytest.raises(RuntimeError, match="has no bank: fit it first"):
        SgfrModel("resnet18").eval()(torch.zeros(1, 3, 64, 64))


def test_an_image_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        fitted()(torch.full((1, 3, 64, 64), torch.nan))


class _Waits(TorchDispatchMode):
    """Counts what a graphics card would have to be waited for: numbers that Python asks of a
    tensor; not lists.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        }
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["affine", "ridge"])
def test_scoring_waits_for_a_card_once(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fitted(solver=solver)
    images = torch.randn(3, 3, 64, 64)
    model(images)  # what is made once, is made now
    lists: list[Tensor] = []
    monkeypatch.setattr(
        Tensor, "tolist", lambda tensor: lists.append(tensor) or tensor.numpy().tolist()
    )
    with torch.no_grad(), _Waits() as waits:
        model(images)
    assert waits.count + len(lists) == 1


def test_a_compiled_model_is_one_graph_and_scores_alike() -> None:
    model = fitted(blur=4.0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for number in (1, 3):
            images = torch.randn(number, 3, 64, 64)
            found, expected = compiled(images), model(images)
            torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=1e-5, atol=0.0)
            torch.testing.assert_close(
                found.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-5
            )
        images[1, :, 30] = torch.nan
        found, largest = compiled(images).pred_score, torch.finfo(torch.float32).max
        assert (found == largest).tolist() == [
            False,
            True,
            False,
        ]  # where nobody can raise an error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "lasso"}, "solver must be one of affine, omp, ridge, got 'lasso'"),
        ({"num_atoms": 0}, "num_atoms must be at least 1"),
        ({"regularisation": -0.1}, "regularisation must be"),
        ({"blur": -1.0}, "blur must be"),
        ({"backbone": "resnet18", "layers": ["stem"]}, "layers .* not in backbone"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SgfrModel(**arguments)  # type: ignore[arg-type]


def test_a_large_batch_needs_no_more_memory_than_its_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fitted()
    monkeypatch.setattr(loops, "_CHUNK_VALUES", 50_000)
    rows: list[tuple[int, int]] = []
    find = AffineSolver._products
    monkeypatch.setattr(
        AffineSolver,
        "_products",
        lambda self, patches, atoms: (rows.append(patches.shape), find(self, patches, atoms))[1],
    )
    model(torch.randn(4, 3, 128, 128))
    for bank, number in zip(model.banks, (4 * 16 * 16, 4 * 8 * 8), strict=True):
        atoms, width = bank.atoms.shape
        chunks = [length for length, its_width in rows if its_width == width]
        assert sum(chunks) == number
        assert max(chunks) * (atoms + 4 * 5 * width) <= 50_000
        assert len(chunks) > 1


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
def test_atoms_of_one_image_are_left_out_of_every_scale_to_score_with(solver: str) -> None:
    model = fitted(solver)
    images = torch.randn(1, 3, 64, 64)
    whole = model(images).anomaly_map
    expected = SgfrModel("resnet18", LAYERS, solver=solver, blur=0.0).eval()
    expected.embedder.load_state_dict(model.embedder.state_dict())
    for bank, fewer in zip(model.banks, expected.banks, strict=True):
        bank.origin = (torch.arange(len(bank.atoms)) % 4)[:, None].expand(-1, 5)
        fewer.set(
            bank.atoms[bank.origin[:, 0] != 2], residual_scale=float(bank.residual_scale)
        )  # measured as all are
    left = model.score_embeddings(model.embed(images), (64, 64), model.banks_without([2]))
    torch.testing.assert_close(left.anomaly_map, expected(images).anomaly_map)
    assert torch.equal(model(images).anomaly_map, whole)


def test_the_certificate_of_the_model_sums_its_scales() -> None:
    model = fitted()
    found = model.certificate()
    assert len(found.scales) == 2
    for name in ("patches", "largest", "mean"):
        total = sum(getattr(bank.certificate(), name) for bank in model.banks)
        assert getattr(found, name) == pytest.approx(total)


@pytest.mark.parametrize("copies", ["none", "mirrored", "turned"])
def test_copies_lie_where_the_image_does(copies: Copies) -> None:
    model = SgfrModel("resnet18").train()
    model.embedder = Coordinates()
    images = coordinate_images(2, 64, 96)
    found = model.embed(images, copies)
    number = 1 if copies == "none" else 4
    for part, whole in zip(found, model.embed(images), strict=True):
        assert part.shape == (number * 2, *whole.shape[1:])
        assert torch.equal(part[:2], whole)
        for copy_of in part.unflatten(0, (number, 2)):
            # one pixel of the patch at each place, whichever of its corners comes first
            stride = 64 // part.shape[2]
            difference = (copy_of - whole)[:, 1:]
            assert 0 <= float(difference.min()) <= float(difference.max()) < stride
            assert torch.equal(copy_of[:, 0], whole[:, 0])


def test_copies_are_of_the_images_by_every_way_round() -> None:
    model = SgfrModel("resnet18").train()
    images = torch.randn(1, 3, 64, 64)
    turned = [part.unflatten(0, (4, 1)) for part in model.embed(images, "turned")]
    mirrored = [part.unflatten(0, (4, 1)) for part in model.embed(images, "mirrored")]
    for scale, (ways, sides) in enumerate(zip(turned, mirrored, strict=True)):
        for quarters in range(4):
            expected = model.embed(torch.rot90(images, quarters, (2, 3)))[scale]
            torch.testing.assert_close(torch.rot90(ways[quarters], quarters, (2, 3)), expected)
        for number, axes in enumerate(((), (3,), (2, 3), (2,))):
            expected = model.embed(images.flip(axes))[scale]
            torch.testing.assert_close(sides[number].flip(axes), expected)
