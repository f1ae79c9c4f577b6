"""Score, label, map and mask of an image are the same by every route, for every checkpoint."""

import math
from pathlib import Path

import pytest

from benchmarks.agreement import (
    EXACT,
    ROUTES,
    SHAPES,
    Answer,
    Way,
    by_engine,
    compare,
    draw,
    make_ways,
    way_of_shapes,
)
from tests.conftest import engine_in

# An export takes seconds, so files are compared for two checkpoints only: other banks, and another
# threshold.
EXPORTED = ("adapt", "reject", "image_sensitivity asked for")
OF_FILES = {
    name
    for name in ROUTES
    if "file" in name or "Inferencer" in name or "ONNX" in name or "script" in name
}
OF_FILES |= {"run_openvino.py"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def ways(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Way]:
    return make_ways(parts, tmp_path_factory.mktemp("ways"))


WAYS = [
    "fit",
    "threshold --false_alarm_rate",
    "threshold --score",
    "accept",
    "accept --undo",
    "adapt",
    "update",
    "reject",
    "false_alarm_rate asked for",
    "image_sensitivity asked for",
]


@pytest.fixture(scope="module")
def engine_says(
    ways: dict[str, Way], parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Answer]]:
    scratch = tmp_path_factory.mktemp("engine")
    return {
        name: by_engine(way, parts / "asked", scratch / str(number))
        for number, (name, way) in enumerate(ways.items())
    }


def test_every_way_is_compared_and_makes_a_difference(
    ways: dict[str, Way], engine_says: dict[str, dict[str, Answer]]
) -> None:
    assert list(ways) == WAYS
    scores = {
        name: tuple(answer.score for answer in answers.values())
        for name, answers in engine_says.items()
    }
    labels = {
        name: sum(answer.label for answer in answers.values())
        for name, answers in engine_says.items()
    }
    assert len({tuple(round(score, 4) for score in each) for each in scores.values()}) >= 6
    assert all(now >= then for now, then in zip(scores["reject"], scores["fit"], strict=True))
    assert scores["reject"] != scores["fit"]
    assert labels["threshold --score"] > labels["fit"]
    assert labels["image_sensitivity asked for"] > labels["fit"]
    assert scores["image_sensitivity asked for"] == scores["fit"]
    assert (
        scores["accept --undo"]
        == scores["threshold --false_alarm_rate"]
        == scores["false_alarm_rate asked for"]
    )


@pytest.mark.parametrize("route", [name for name in ROUTES if name not in OF_FILES])
@pytest.mark.parametrize("name", WAYS)
def test_routes_in_python_agree(
    name: str,
    route: str,
    ways: dict[str, Way],
    parts: Path,
    engine_says: dict[str, dict[str, Answer]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    del capfd  # keeps the tables that Lightning prints
    way = ways[name]
    ask, takes_arguments, tolerance = ROUTES[route]
    if way.asked and not takes_arguments:
        pytest.skip("takes no arguments beside the checkpoint")
    found = compare(engine_says[name], ask(way, parts / "asked", tmp_path), way.threshold)
    assert found.score <= tolerance
    assert found.labels == 0
    assert math.isnan(found.map) or found.map <= tolerance
    assert math.isnan(found.pixels) or found.pixels == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_files_agree(
    name: str,
    ways: dict[str, Way],
    parts: Path,
    engine_says: dict[str, dict[str, Answer]],
    tmp_path: Path,
) -> None:
    _exported_files_agree(ways[name], parts, engine_says[name], tmp_path)


def _exported_files_agree(
    way: Way, parts: Path, engine_says: dict[str, Answer], folder: Path
) -> None:
    for route in [route for route in ROUTES if route in OF_FILES]:
        ask, _, tolerance = ROUTES[route]
        found = compare(engine_says, ask(way, parts / "asked", folder), way.threshold)
        assert found.score <= tolerance, route
        assert found.labels <= (0 if tolerance == EXACT else found.near), route
        assert math.isnan(found.map) or found.map <= 4 * tolerance, route
        assert math.isnan(found.pixels) or found.pixels < tolerance, route


@pytest.fixture(scope="module")
def of_shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Way, Path, dict[str, Answer]]:
    """A model of images of several aspect ratios, images, and the Engine's answers."""
    folder = tmp_path_factory.mktemp("shapes")
    root = draw(folder / "parts", SHAPES)
    way = way_of_shapes(root, folder / "fitted")
    answers = by_engine(way, root / "asked", folder / "asked")
    assert {answer.map.shape for answer in answers.values() if answer.map is not None} == {*SHAPES}
    assert {answer.label for answer in answers.values()} == {False, True}
    return way, root, answers


@pytest.mark.parametrize("route", [name for name in ROUTES if name not in OF_FILES])
def test_routes_in_python_agree_on_images_of_several_aspect_ratios(
    route: str,
    of_shapes: tuple[Way, Path, dict[str, Answer]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    del capfd  # keeps the tables that Lightning prints
    way, root, engine_says = of_shapes
    ask, _, tolerance = ROUTES[route]
    found = compare(engine_says, ask(way, root / "asked", tmp_path), way.threshold)
    assert found.score <= tolerance
    assert found.labels == 0
    assert math.isnan(found.map) or found.map <= tolerance
    assert math.isnan(found.pixels) or found.pixels == 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
def test_exported_files_agree_on_images_of_several_aspect_ratios(
    of_shapes: tuple[Way, Path, dict[str, Answer]], tmp_path: Path
) -> None:
    _exported_files_agree(*of_shapes, tmp_path)


@pytest.mark.parametrize("name", WAYS)
def test_test_validate_fit_and_export_run_on_every_checkpoint(
    name: str, ways: dict[str, Way], parts: Path, tmp_path: Path
) -> None:
    from anomalib.data import Folder

    way = ways[name]

    def module() -> Folder:
        folders = {
            "normal_dir": "good",
            "abnormal_dir": "asked/bad",
            "normal_test_dir": "asked/good",
        }
        return Folder("p", root=parts, **folders, val_split_mode="same_as_test", num_workers=0)  # type: ignore[arg-type]

    (figures,) = engine_in(tmp_path).test(
        way.model(), datamodule=module(), ckpt_path=way.checkpoint
    )
    assert figures["image_AUROC"] > 0.9
    assert "image_F1Score" in figures
    validated = way.model()
    engine_in(tmp_path).validate(validated, datamodule=module(), ckpt_path=way.checkpoint)
    assert validated.post_processor.is_set
    updated = way.model()
    updated.update = True
    engine_in(tmp_path).fit(updated, datamodule=module(), ckpt_path=way.checkpoint)
    assert updated.model.certificate().patches > 0
    assert engine_in(tmp_path).export(
        way.model(), "torch", export_root=tmp_path, ckpt_path=way.checkpoint
    )
