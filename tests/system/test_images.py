"""An image has the same score however it is stored and read, or is refused by name."""

import csv
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.deploy import ExportType
from numpy.typing import NDArray
from PIL import Image

from anomalib_sgfr import Inspector, NominalPostProcessor, ScoreTable, Sgfr
from anomalib_sgfr.cli.prediction import readable
from anomalib_sgfr.images.frame_geometry import frame_transform
from anomalib_sgfr.images.headers import NOT_READ, SUFFIXES
from tests.conftest import engine_in

EXAMPLE = Path(__file__).parents[2] / "examples" / "run_openvino.py"
Values = NDArray[Any]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("run_openvino", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(seed: int = 0, spot: float = 160.0) -> Values:
    """A part that is neither square nor symmetric, in colour."""
    rows, columns = np.mgrid[:80, :120]
    grey = (
        110
        + 40 * np.sin(rows / 5) * np.cos(columns / 5)
        + np.random.default_rng(seed).normal(0, 6, rows.shape)
    )
    grey[(rows - 20) ** 2 + (columns - 90) ** 2 < 80] = spot
    return np.stack([grey, 0.8 * grey, 255 - grey], -1).clip(0, 255).astype(np.uint8)


COLOUR = drawn()
GREY = COLOUR[..., 0]
DEEP = GREY.astype(np.uint16) * 257


class Model(NamedTuple):
    fitted: Sgfr
    checkpoint: Path
    xml: Path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Model of a camera of 16 bits, fitted to parts in colour and grey."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    (folder / "good").mkdir()
    for seed in range(1, 11):
        values = drawn(seed, spot=110.0)
        Image.fromarray(values if seed % 2 else values[..., 0]).save(
            folder / "good" / f"{seed}.png"
        )
    fitted = Sgfr(
        "test_resnet",
        layers=["layer1", "layer2"],
        score_layers=["layer1", "layer2"],
        pre_trained=False,
        bank_size=100,
        image_size=64,
        bit_depth=16,
        post_processor=NominalPostProcessor(0.1),
        visualizer=False,
        evaluator=False,
    )
    engine = engine_in(folder, limit_val_batches=0)
    engine.fit(
        fitted,
        datamodule=Folder(
            "p", root=folder, normal_dir="good", normal_test_dir="good", num_workers=0
        ),
    )
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    xml = engine.export(fitted, ExportType.OPENVINO, export_root=folder)
    assert xml is not None
    return Model(fitted, folder / "model.ckpt", xml)


def by_pillow(
    values: Values, mode: str | None = None, turned: bool = False, **options: Any
) -> Callable[[Path], None]:
    """Save with Pillow; turned, with the EXIF orientation that turns it back."""

    def write(path: Path) -> None:
        image = Image.fromarray(np.rot90(values) if turned else values)
        exif = Image.Exif()
        exif[0x0112] = 6
        (image.convert(mode) if mode else image).save(
            path, **({"exif": exif} if turned else {}), **options
        )

    return write


def by_tifffile(values: Values, **options: Any) -> Callable[[Path], None]:
    kind = {"photometric": "rgb" if values.ndim == 3 else "minisblack", **options}
    return lambda path: tifffile.imwrite(path, values, **kind)


def by_cv2(values: Values) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(cv2.imencode(".png", values)[1].tobytes())


def pages(**options: Any) -> Callable[[Path], None]:
    return by_pillow(
        COLOUR, save_all=True, append_images=[Image.fromarray(COLOUR[::-1])], **options
    )


class Case(NamedTuple):
    """An image, the one that it equals, and the routes that refuse it."""

    write: Callable[[Path], None]
    like: str | None = "colour.png"  # None: as by the other routes
    close: float = 0.0
    refused_by: tuple[str, ...] = ()


CASES: dict[str, Case] = {
    "colour.png": Case(by_pillow(COLOUR)),
    "grey.png": Case(by_pillow(GREY), None),
    "CAPITAL.PNG": Case(by_pillow(COLOUR)),
    "a name, with 部品 & more.png": Case(by_pillow(COLOUR)),
    "alpha.png": Case(by_pillow(np.dstack([COLOUR, np.full(GREY.shape, 99, np.uint8)]))),
    "grey_alpha.png": Case(by_pillow(np.dstack([GREY, GREY]), None), "grey.png"),
    "palette.png": Case(by_pillow(COLOUR, "P"), None),
    "one_bit.png": Case(by_pillow(GREY > 128), None),
    "turned.png": Case(by_pillow(COLOUR, turned=True)),
    "animated.png": Case(pages()),
    "deep.png": Case(by_pillow(DEEP), "grey.png"),
    "deep_turned.png": Case(by_pillow(DEEP, turned=True), "grey.png"),
    "deep_colour.png": Case(
        by_cv2(COLOUR[..., ::-1].astype(np.uint16) * 257), refused_by=("example",)
    ),
    "colour.jpg": Case(by_pillow(COLOUR, quality=100, subsampling=0), close=0.02),
    "turned.jpg": Case(by_pillow(COLOUR, turned=True, quality=100, subsampling=0), close=0.02),
    "cmyk.jpg": Case(by_pillow(COLOUR, "CMYK", quality=100), close=0.05),
    "colour.bmp": Case(by_pillow(COLOUR)),
    "palette.bmp": Case(by_pillow(GREY, "P"), "grey.png"),
    "colour.webp": Case(by_pillow(COLOUR, lossless=True)),
    "turned.webp": Case(by_pillow(COLOUR, turned=True, lossless=True)),
    "animated.webp": Case(pages(lossless=True)),
    "colour.tif": Case(by_pillow(COLOUR)),
    "turned.tif": Case(by_pillow(COLOUR, turned=True)),
    "lzw.tiff": Case(by_pillow(COLOUR, compression="tiff_lzw")),
    "cmyk.tif": Case(by_pillow(COLOUR, "CMYK")),
    "planes.tif": Case(
        by_tifffile(np.moveaxis(COLOUR, -1, 0), photometric="rgb", planarconfig="separate")
    ),
    "pages.tif": Case(pages()),
    "big.tif": Case(by_tifffile(COLOUR, bigtiff=True)),
    "deep.tif": Case(by_tifffile(DEEP), "grey.png"),
    "deep_turned.tif": Case(
        by_tifffile(np.rot90(DEEP), extratags=[(274, "H", 1, 6, True)]), "grey.png"
    ),
    "deep_pages.tif": Case(
        by_tifffile(np.stack([DEEP, DEEP[::-1]])[:, :, :, None], photometric="minisblack"),
        "grey.png",
    ),
    "12_bits.tif": Case(
        by_tifffile(np.round(GREY / 255 * 4095).astype(np.uint16), bitspersample=12),
        "grey.png",
        2e-3,
    ),
    "deep_colour.tif": Case(by_tifffile(COLOUR.astype(np.uint16) * 257), refused_by=("example",)),
    "float.tif": Case(by_tifffile((GREY / 255).astype(np.float32)), "grey.png"),
    "float_colour.tif": Case(
        by_tifffile((COLOUR / 255).astype(np.float32)), refused_by=("example", "engine")
    ),
    "double.tif": Case(by_tifffile(GREY / 255), "grey.png", refused_by=("example", "engine")),
    "grey.pgm": Case(by_pillow(GREY), "grey.png"),
    "deep.pgm": Case(
        lambda path: path.write_bytes(b"P5 120 80 65535\n" + DEEP.astype(">u2").tobytes()),
        "grey.png",
    ),
    "colour.ppm": Case(by_pillow(COLOUR)),
    # suffixes that are not read from folders
    "colour.gif": Case(by_pillow(COLOUR, "P"), None),
    "colour.jp2": Case(by_pillow(COLOUR, irreversible=False)),
    "colour.pnm": Case(by_pillow(COLOUR)),
    "one_bit.pbm": Case(by_pillow(GREY > 128), "one_bit.png"),
}
REFUSED: dict[str, Callable[[Path], None]] = {  # by all
    "white_is_zero.tif": by_tifffile(65535 - DEEP, photometric="miniswhite"),
    "hundreds.tif": by_tifffile(GREY.astype(np.float32)),
    "deep.jp2": by_pillow(DEEP),
    "cut.png": lambda path: by_pillow(COLOUR)(path) or path.write_bytes(path.read_bytes()[:2000]),
    "text.jpg": lambda path: path.write_text("not an image"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name, case in CASES.items():
        place = root / ("floats" if "engine" in case.refused_by else "") / name
        place.parent.mkdir(exist_ok=True)
        case.write(place)
    return root


def in_folder(root: Path, name: str) -> Path:
    return next(root.rglob(name))


class Found(NamedTuple):
    score: float
    label: bool
    place: tuple[int, int] | None


def found_by(inspector: Inspector, paths: list[Path]) -> dict[str, Found]:
    found = inspector(paths)
    return {
        path.name: Found(one.score, bool(one.label), one.place)
        for path, one in zip(paths, found, strict=True)
    }


def found_in(table: Path) -> dict[str, Found]:
    with table.open(newline="", encoding="utf-8") as file:
        return {
            Path(row["image"]).name: Found(
                float(row["score"]), row["label"] == "1", (int(row["row"]), int(row["column"]))
            )
            for row in csv.DictReader(file)
        }


@pytest.fixture(scope="module")
def routes(
    model: Model, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Found]]:
    """Predictions of each route, for each image that it reads."""
    scratch = tmp_path_factory.mktemp("routes")
    paths = [in_folder(folder, name) for name in CASES]
    routes = {
        name: found_by(Inspector.load(file), paths)
        for name, file in model._asdict().items()
        if name != "fitted"
    }
    listed = [path for path in paths if path.suffix.lower() in SUFFIXES]
    engines = scratch / "engine"
    engines.mkdir()
    for path in listed:
        if path.parent == folder:
            (engines / path.name).symlink_to(path)
    for name, options in (
        ("engine", {"dataset": PredictDataset(engines)}),
        ("report", {"dataloaders": readable(listed, {}, 16)}),
    ):
        table = scratch / f"{name}.csv"
        engine_in(scratch, callbacks=[ScoreTable(table)]).predict(model.fitted, **options)
        routes[name] = found_in(table)
    own = example()
    assert own.main([str(model.xml), str(folder), "--out", str(scratch / "out")]) == 1
    routes["example"] = found_in(scratch / "out" / "scores.csv")
    for path in set(paths) - set(listed):  # by name
        assert own.main([str(model.xml), str(path), "--out", str(scratch / "one")]) == 0
        routes["example"] |= found_in(scratch / "one" / "scores.csv")
    return routes


@pytest.mark.parametrize("name", CASES)
def test_an_image_is_the_same_by_every_route(
    name: str, routes: dict[str, dict[str, Found]]
) -> None:
    case, reference = CASES[name], routes["checkpoint"]
    listed = Path(name).suffix.lower() in SUFFIXES
    reading = {"checkpoint", "xml", "example", *(["engine", "report"] if listed else [])}
    assert {route for route, found in routes.items() if name in found} == reading - {
        *case.refused_by
    }
    for found in routes.values():
        if name in found:
            assert found[name].score == pytest.approx(reference[name].score, abs=1e-3)
            assert found[name].label == reference[name].label
    if case.like is not None:
        assert reference[name].score == pytest.approx(
            reference[case.like].score, abs=1e-4 + case.close
        )
    # the peak: the same to a pixel of the model's, which are two of the image's
    places = [found[name].place for found in routes.values() if name in found]
    assert all(np.abs(np.subtract(place, places[0])).max() <= 2 for place in places)
    if case.like is not None and not case.close:
        assert np.abs(np.subtract(places[0], reference[case.like].place)).max() <= 2


def test_the_images_tell_wrong_readings_apart(
    routes: dict[str, dict[str, Found]], model: Model
) -> None:
    """The scores of wrong readings differ by more than the tests above allow."""
    inspector, right = Inspector.load(model.checkpoint), routes["checkpoint"]["colour.png"].score
    for wrong in (
        np.rot90(COLOUR),
        COLOUR[::-1],
        COLOUR[..., ::-1],
        COLOUR // 2,
        np.repeat(GREY[..., None], 3, 2),
    ):
        assert abs(inspector(np.ascontiguousarray(wrong)).score - right) > 1e-3


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "engine" in case.refused_by]
)
def test_images_that_anomalib_cannot_open_are_named(
    name: str, model: Model, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=name):
        engine_in(tmp_path).predict(model.fitted, dataset=PredictDataset(in_folder(folder, name)))


@pytest.mark.parametrize("name", REFUSED)
def test_images_that_no_route_reads_are_refused_by_name(
    name: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    REFUSED[name](path)
    for file in (model.checkpoint, model.xml):
        with pytest.raises((OSError, ValueError), match=name):
            Inspector.load(file)(path)
    if path.suffix in SUFFIXES:
        with pytest.raises((OSError, ValueError)) as caught:
            engine_in(tmp_path).predict(model.fitted, dataset=PredictDataset(path))
        assert name in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert example().main([str(model.xml), str(path), "--out", str(tmp_path / "out")]) == 1
    assert f"{path}: cannot be read: " in capsys.readouterr().err


def test_the_example_skips_bad_files_and_counts_unread_ones(
    model: Model, folder: Path, tmp_path: Path
) -> None:
    """Also on a console that cannot show the names."""
    root = tmp_path / "部品"
    root.mkdir()
    for name in ("colour.png", "colour.webp", "colour.gif", "colour.pnm"):
        (root / name).write_bytes((folder / name).read_bytes())
    for name, write in REFUSED.items():
        write(root / name)
    command = [sys.executable, str(EXAMPLE), str(model.xml), str(root), "--out", str(root / "out")]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, encoding="cp1252"
    )
    assert done.returncode == 1
    assert "2 images in" in done.stdout
    assert "Traceback" not in done.stderr
    assert "3 images are not read: 1 .gif, 1 .jp2, 1 .pnm" in done.stderr
    for name in REFUSED:
        assert (f"{name}: cannot be read" in done.stderr) == (Path(name).suffix in SUFFIXES)
    with (root / "out" / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(root / "colour.png"), str(root / "colour.webp")]
    assert list(rows[0]) == ["image", "score", "label", "row", "column"]
    assert len(list((root / "out").rglob("*.png"))) == 2


# Ctrl-C when five images are scored and the main thread waits for the others, which take long
_INTERRUPTED = """
import importlib.util, itertools, signal, sys, threading, time
from concurrent.futures import Future
spec = importlib.util.spec_from_file_location("run_openvino", sys.argv[1])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
inspect, result = example.inspect, Future.exception
numbers, waiting = itertools.count(1), threading.Event()
def exception(self, timeout=None):
    waiting.set()
    return result(self, timeout)
def slow(*args):
    number = next(numbers)
    if number > 5:
        time.sleep(0.1)
    row = inspect(*args)
    if number == 5:
        waiting.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    return row
Future.exception, example.inspect = exception, slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.exit(example.main(sys.argv[2:]))
"""


def test_the_table_of_an_interrupted_run_has_what_was_scored(
    model: Model, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(400):
        (tmp_path / "in" / f"{number:03}.png").symlink_to(folder / "colour.png")
    out = tmp_path / "out"
    given = [EXAMPLE, model.xml, tmp_path / "in", "--out", out]
    running = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, *map(str, given)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = running.stderr
    assert running.returncode == 130
    assert len([line for line in said.splitlines() if not line.startswith("warning: ")]) == 1
    assert "images were not read" in said
    with (out / "scores.csv").open(newline="", encoding="utf-8") as file:
        assert 5 <= len(list(csv.DictReader(file))) < 400


def test_the_example_has_the_same_suffixes() -> None:
    own = example()
    assert own.SUFFIXES == SUFFIXES
    assert own.NOT_READ == NOT_READ


def test_an_exported_file_has_the_settings_of_the_checkpoint(model: Model, folder: Path) -> None:
    one, other = Inspector.load(model.checkpoint), Inspector.load(model.xml)
    assert other.threshold == pytest.approx(one.threshold)
    assert other.warning == one.warning is not None
    assert " good images: at 95% confidence the real false-alarm rate is " in one.warning
    assert (other.size, other.bit_depth) == (one.size, one.bit_depth) == ((64, 64), 16)
    path = folder / "colour.png"
    for value in (other, one):
        assert value([path, path])[1].score == pytest.approx(value(path).score, abs=1e-5)
    assert other(path).place is not None


def test_an_exported_file_serves_threads(model: Model, folder: Path) -> None:
    inspector = Inspector.load(model.xml)
    paths = [
        folder / name
        for name in ("colour.png", "grey.png", "palette.png", "turned.jpg", "one_bit.png")
    ]
    alone = [inspector(path) for path in paths]
    together = threading.Barrier(8)

    def use(number: int) -> list[Any]:
        together.wait()
        return [inspector(path) for path in paths] if number % 2 else inspector(paths)

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(use, range(16)):
            for one, each in zip(alone, found, strict=True):
                assert each.score == pytest.approx(one.score, abs=1e-6)
                assert (each.label, each.place) == (one.label, one.place)
                np.testing.assert_allclose(each.map, one.map, atol=1e-5)


@pytest.mark.parametrize("size", [(80, 120), (121, 77)])
@pytest.mark.parametrize(
    "steps",
    [
        [],
        [("resize", 64, 48)],
        [("shorter", 100, None), ("crop", 64, 64)],
        [("shorter", 100, 120), ("pad", 3, 5, 7, 9), ("crop", 201, 40)],
    ],
)
def test_the_example_transforms_frames_as_the_package_does(
    steps: list[tuple[object, ...]], size: tuple[int, int]
) -> None:
    own = example().frame_transform(steps, size)
    assert list(map(tuple, own)) == list(map(tuple, frame_transform(steps, size)[:2]))
