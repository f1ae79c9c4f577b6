"""Choice of the image size: the aspect ratio of the training images, or each image's own."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, RandomRotation

from anomalib_sgfr.training.image_size import (
    choose_size,
    require_drawn_on_image,
    require_one_size,
    squeezed,
    stretched_mask,
    training_sizes,
)

SQUARE = ((256, 256), None)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], SQUARE),
        ([(300, 300)] * 3, SQUARE),
        ([(1255, 500), (1240, 500)], ((416, 160), None)),
        ([(300, 300), (300, 330), (330, 300)], SQUARE),
        ([(300, 300)] * 20 + [(300, 900)], SQUARE),
        ([(900, 300)] * 20 + [(300, 300)], ((448, 160), None)),
        ([(300, 300), (300, 900)], ((256, 256), (256, 32))),
        ([(100, 140), (100, 160), (100, 180)], ((256, 256), (256, 32))),
    ],
)
def test_one_aspect_ratio_is_kept_and_several_each(sizes: list, expected: tuple) -> None:
    assert choose_size(sizes, 256, 32) == expected


def test_sizes_of_a_rule_are_multiples_of_the_step() -> None:
    size, rule = choose_size([(300, 300), (300, 900)], 250, 32)
    assert (size, rule) == ((256, 256), (256, 32))
    assert choose_size([(300, 300)], 250, 32) == ((250, 250), None)


def test_images_between_two_sizes_that_are_alike_have_one() -> None:
    sizes = [(100, 112), (100, 114), (100, 116)]
    assert len({choose_size([size], 256, 32)[0] for size in sizes}) == 2
    size, rule = choose_size(sizes, 256, 32)
    assert rule is None
    assert size == choose_size([(100, 114)], 256, 32)[0]


def data_of(paths: list, augmentations: object = None) -> SimpleNamespace:
    samples = pd.DataFrame({"image_path": [str(path) for path in paths]})
    return SimpleNamespace(
        train_data=SimpleNamespace(samples=samples), train_augmentations=augmentations
    )


@pytest.fixture
def files(tmp_path: Path) -> list:
    made = []
    for name, size, turned in (
        ("a", (40, 100), False),
        ("b", (100, 40), True),
        ("c", (80, 80), False),
    ):
        made.append(tmp_path / f"{name}.jpg")
        exif = Image.Exif()
        if turned:
            exif[0x0112] = 6
        Image.new("RGB", size).save(made[-1], exif=exif)
    return made


def test_sizes_are_those_that_the_data_set_gives(files: list) -> None:
    assert training_sizes(data_of(files)) == [(100, 40), (100, 40), (80, 80)]
    assert training_sizes(data_of(files, CenterCrop((50, 60)))) == [(50, 60)] * 3
    assert training_sizes(data_of(files, RandomRotation(10))) == []
    assert training_sizes(None) == []
    files[0].write_bytes(b"no image")
    assert training_sizes(data_of(files)) == []


def test_a_batch_of_several_sizes_is_refused(files: list) -> None:
    require_one_size(files[:2], (128, 32))
    require_one_size([*files[:2], "gone.png"], (128, 32))
    with pytest.raises(ValueError, match=r"different aspect ratios, '.*a.jpg' and '.*c.jpg'"):
        require_one_size(files, (128, 32))


def test_a_region_of_another_shape_is_refused() -> None:
    sizes = [(100, 40)] * 3
    require_drawn_on_image((201, 80), sizes, "roi.png")
    require_drawn_on_image((80, 80), [(100, 40), (80, 80)], "roi.png")
    require_drawn_on_image((80, 80), [], "roi.png")
    with pytest.raises(ValueError, match=r"roi 'roi.png' has 80 x 80 pixels .* have 100 x 40"):
        require_drawn_on_image((80, 80), sizes, "roi.png")


def test_a_mask_of_another_shape_is_named(files: list) -> None:
    assert stretched_mask([files[1], "", None, "gone.png"], [files[0], *files]) is None
    warning = stretched_mask(files, [files[1], files[2], files[2]])
    assert warning is not None
    assert f"mask '{files[1]}' has 100 x 40 pixels (height x width), its image 80 x 80" in warning


def test_squeezed_images_are_named(files: list) -> None:
    assert squeezed([*files, "gone.png"], 2.5) == [str(files[2])]
    assert squeezed(files, 1.7) == [str(files[2])]
    assert squeezed(files, 2.0) == [str(files[2])]
    assert squeezed(files[2:], 1.2) == []
