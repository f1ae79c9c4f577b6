"""Drawn defects: size, contrast and place as asked, and the image as it was everywhere else."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from anomalib_sgfr.images.drawn_defects import (
    KINDS,
    DrawnDefect,
    choose_centre,
    distance_inside,
    draw_defect,
    sharpness,
)

Image = NDArray[np.float32]


def surface(size: tuple[int, int] = (120, 150), *, grey: bool = False, seed: int = 0) -> Image:
    """A textured image in colour."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    texture = 0.5 + 0.15 * np.sin(rows / 4.0) * np.cos(columns / 5.0) + rng.normal(0, 0.02, size)
    tint = np.ones(3) if grey else np.array([1.1, 1.0, 0.8])
    return (texture[..., None] * tint).clip(0, 1).astype(np.float32)


def flat(size: tuple[int, int] = (120, 150), value: float = 0.5) -> Image:
    return np.full((*size, 3), value, np.float32)


def draw(
    image: Image,
    kind: str,
    size: float = 30.0,
    contrast: float = 0.25,
    seed: int = 1,
    **more: object,
) -> DrawnDefect:
    centre = more.pop("centre", (image.shape[0] / 2, image.shape[1] / 2))
    rng = np.random.default_rng(seed)
    found = draw_defect(image, kind, size, contrast, centre, rng, **more)  # type: ignore[arg-type]
    assert found is not None
    return found


def extent(mask: NDArray[np.bool_]) -> float:
    """Largest distance between two pixels, and one."""
    points = np.argwhere(mask)
    edge = points[ndimage.binary_erosion(mask)[mask] == 0]
    return float(np.linalg.norm(edge[:, None] - edge[None], axis=-1).max()) + 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_outside_the_region(kind: str) -> None:
    image = surface()
    region = np.zeros(image.shape[:2], np.bool_)
    region[:, :75] = True
    found = draw(image, kind, region=region)
    np.testing.assert_array_equal(found.image[:, 75:], image[:, 75:])
    assert (found.image[:, :75] != image[:, :75]).any()
    assert not found.mask[:, 75:].any()
    assert found.mask.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_draws_the_same_again(kind: str) -> None:
    image = surface()
    one, again, other = (draw(image, kind, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image != other.image).any()
    np.testing.assert_array_equal(image, surface())  # the image itself stays


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8.0, 30.0, 60.0])
def test_the_size_is_the_largest_extent(kind: str, size: float) -> None:
    image = surface((200, 220))
    for seed in range(8):
        found = draw(image, kind, size, seed=seed, blur=0.5)
        changed = (found.image != image).any(-1)
        # a line bends, and thins towards its ends
        assert extent(changed) <= 1.1 * size + 2 * (3 * 0.5 + 2)
        assert extent(found.mask) <= extent(changed)
        assert extent(found.mask) >= 0.6 * size - 1.0
    if kind == "spot":  # on a flat ground the mask tells exactly
        found = draw(flat((200, 220)), kind, size, blur=0.5)
        assert extent(found.mask) == pytest.approx(size, abs=2.5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_contrast_changes_nothing(kind: str) -> None:
    image = surface()
    found = draw(image, kind, contrast=0.0)
    np.testing.assert_array_equal(found.image, image)
    assert found.contrast == 0.0
    assert not found.mask.any()


@pytest.mark.parametrize("kind", ["spot", "scratch", "thread", "piece", "dent"])
def test_the_contrast_is_as_asked_and_grows(kind: str) -> None:
    image = flat()
    found = [draw(image, kind, 40.0, contrast, blur=0.5).contrast for contrast in (0.1, 0.2, 0.4)]
    assert found[0] < found[1] < found[2]
    for contrast, measured in zip((0.1, 0.2, 0.4), found, strict=True):
        # the root of the mean square within the mask: a line is blurred, a dent is zero within
        least = {"spot": 0.9, "piece": 0.9, "dent": 0.5}.get(kind, 0.5)
        assert least * contrast <= measured <= 1.15 * contrast


@pytest.mark.parametrize("kind", KINDS)
def test_grey_stays_grey_and_values_stay_in_range(kind: str) -> None:
    for value in (0.02, 0.98):
        image = (surface(grey=True) - 0.5 + value).clip(0, 1).astype(np.float32)
        found = draw(image, kind, contrast=0.5)
        np.testing.assert_allclose(found.image, found.image[..., :1].repeat(3, -1), atol=1e-6)
        assert found.image.min() >= 0.0
        assert found.image.max() <= 1.0
        assert found.image.dtype == np.float32


@pytest.mark.parametrize("kind", ["spot", "scratch", "thread"])
def test_contrast_turns_where_there_is_no_room(kind: str) -> None:
    for value, sign in ((0.0, 1), (1.0, -1)):
        for seed in range(6):
            found = draw(flat(value=value), kind, seed=seed)
            assert found.mask.any()
            change = found.image.mean(-1)[found.mask] - value
            assert (sign * change > 0.0).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "distortion"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (200, 3), (17, 23)])
@pytest.mark.parametrize("corner", [False, True])
def test_any_shape_of_image(kind: str, shape: tuple[int, int], corner: bool) -> None:
    centre = (0.0, float(shape[1] - 1)) if corner else (shape[0] / 2, shape[1] / 2)
    found = draw(surface(shape), kind, 40.0, centre=centre)
    assert found.image.shape == (*shape, 3)
    assert found.mask.shape == shape
    assert np.isfinite(found.image).all()


@pytest.mark.parametrize("kind", ["spot", "dent", "piece"])
def test_noise_of_the_camera_stays(kind: str) -> None:
    rng = np.random.default_rng(0)
    image = (flat((200, 200)) + rng.normal(0, 0.02, (200, 200, 1))).astype(np.float32)
    for seed in range(6):  # a piece is missing or pasted
        found = draw(image, kind, 80.0, seed=seed)
        inner = ndimage.binary_erosion(found.mask, iterations=6)
        noise = [
            (part - ndimage.gaussian_filter(part, 2.0))[inner].std()
            for part in (image[..., 0], found.image[..., 0])
        ]
        assert noise[1] == pytest.approx(noise[0], rel=0.25)


def test_small_defects_are_antialiased() -> None:
    """What a spot takes away grows as its area, wherever it lies between the pixels."""
    image = flat((200, 200))

    def taken(size: float, shift: float) -> float:
        found = draw(image, "spot", size, centre=(100.0 + shift, 100.0 - shift))
        return float(np.abs(found.image - image).sum())

    whole = taken(80.0, 0.0)
    for size in (2.0, 4.0, 10.0):
        for shift in (0.0, 0.25, 0.5):
            expected = whole * (size / 80.0) ** 2
            assert taken(size, shift) == pytest.approx(expected, rel=0.35 if size < 4 else 0.12)


def test_the_blur_of_the_optics_softens_the_edge() -> None:
    image = flat((200, 200))
    steps = []
    for blur in (0.5, 1.0, 2.0, 3.0):
        found = draw(image, "spot", 60.0, blur=blur)
        steps.append(float(np.abs(np.diff(found.image[..., 0], axis=0)).max()))
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 2.0 * steps[-1]


def test_a_distortion_needs_texture() -> None:
    rng = np.random.default_rng(0)
    assert draw_defect(flat(), "distortion", 30.0, 0.25, (60, 75), rng) is None
    image = surface()
    found = draw(image, "distortion", 40.0, 0.25)
    # texture is moved, not brightened
    assert found.image.mean() == pytest.approx(float(image.mean()), abs=5e-3)


@pytest.mark.parametrize(
    ("kind", "size", "message"), [("hole", 3.0, "kind must be one of spot"), ("spot", 0.0, "size")]
)
def test_what_cannot_be_drawn_is_refused(kind: str, size: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(flat(), kind, size)


def test_centres_fit_into_the_region() -> None:
    region = np.zeros((60, 90), np.bool_)
    region[10:50, 20:80] = True
    inside = distance_inside(region)
    outside = np.argwhere(np.pad(~region, 1, constant_values=True)) - 1
    for row, column in [(10, 20), (30, 50), (49, 79), (25, 33)]:
        assert inside[row, column] == pytest.approx(
            np.linalg.norm(outside - [row, column], axis=1).min()
        )
    rng = np.random.default_rng(0)
    centres = np.array([choose_centre(inside, 20.0, rng) for _ in range(300)])
    assert (inside[centres[:, 0], centres[:, 1]] >= 10.0).all()
    # all of them, and not their border alone
    assert np.ptp(centres, axis=0).tolist() == pytest.approx([20, 40], abs=4)
    wide = np.array([choose_centre(inside, 500.0, rng) for _ in range(100)])
    assert (inside[wide[:, 0], wide[:, 1]] >= inside.max() / 2.0).all()
    with pytest.raises(ValueError, match="region has no pixel"):
        choose_centre(np.zeros((5, 5)), 3.0, rng)


@pytest.mark.parametrize("blur", [0.8, 1.2, 2.0])
def test_sharpness_is_the_blur_of_an_edge(blur: float) -> None:
    image = np.zeros((80, 80, 3))
    image[:, 40:] = 0.8
    blurred = ndimage.gaussian_filter(image, (blur, blur, 0)).astype(np.float32)
    assert sharpness(blurred) == pytest.approx(blur, rel=0.15)


def test_sharpness_without_edges_and_of_one_pixel() -> None:
    assert sharpness(flat()) == 0.5
    assert sharpness(flat((1, 1))) == 0.5
