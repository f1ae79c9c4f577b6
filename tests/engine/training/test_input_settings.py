"""Size, tiles and region: learnt with, kept, and others refused by name."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder, PredictDataset
from anomalib.data.utils import read_image
from PIL import Image

from anomalib_sgfr import Sgfr
from anomalib_sgfr.features.tiling import Tiling
from anomalib_sgfr.report.explanation import explain
from tests.conftest import atoms, engine_in, fit, folder_datamodule, small, write_image

_SIZE = 96
_TILES = Tiling((48, 48), (48, 48))
_LAYERS = ["blocks.2", "blocks.4"]  # tiles are multiples of the coarsest stride, 16


def tiler(**arguments: object) -> TilerConfigurationCallback:
    return TilerConfigurationCallback(**{"enable": True, "tile_size": 48, **arguments})  # type: ignore[arg-type]


def framed(**arguments: object) -> Sgfr:
    return small(**{"image_size": _SIZE, "layers": _LAYERS, "seed": 3, **arguments})


def fitted(folder: Path, model: Sgfr, root: Path, *callbacks: TilerConfigurationCallback) -> Path:
    engine = fit(model, folder_datamodule(root), folder, callbacks=list(callbacks))
    return Path(engine.best_model_path)


def answers(
    model: Sgfr, path: Path, folder: Path, ckpt_path: Path | None = None, **arguments: object
) -> torch.Tensor:
    (batch,) = engine_in(folder, **arguments).predict(
        model, dataset=PredictDataset(path), ckpt_path=ckpt_path
    )
    return batch.anomaly_map


@pytest.fixture(scope="module")
def by_callback(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sgfr, Path]:
    """Fitted with anomalib's callback, which is given no stride."""
    model = framed()
    return model, fitted(tmp_path_factory.mktemp("callback"), model, parts, tiler())


@pytest.fixture(scope="module")
def masked(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sgfr, Path, Path]:
    """Model with tiles and a region, its checkpoint, and a copy of the mask, which is gone."""
    folder = tmp_path_factory.mktemp("masked")
    inside = np.zeros((96, 96), np.uint8)
    inside[:, :64] = 255
    Image.fromarray(inside).save(folder / "roi.png")
    model = framed(tile_size=48, roi=str(folder / "roi.png"), thumbnails=True, trim=0.1)
    path = fitted(folder, model, parts)
    shutil.move(folder / "roi.png", folder / "copy.png")
    return model, path, folder / "copy.png"


def test_arguments_do_what_the_callback_does(
    by_callback: tuple[Sgfr, Path], parts: Path, tmp_path: Path
) -> None:
    model = framed(tile_size=48)
    fitted(tmp_path, model, parts)
    assert torch.equal(atoms(model), atoms(by_callback[0]))
    assert (
        Tiling.from_tiler(model.model.tiler)
        == Tiling.from_tiler(by_callback[0].model.tiler)
        == _TILES
    )
    whole = framed()
    fitted(tmp_path, whole, parts)
    assert not torch.equal(atoms(whole), atoms(model))


def test_tiles_are_kept_in_the_checkpoint(
    by_callback: tuple[Sgfr, Path], parts: Path, tmp_path: Path
) -> None:
    model, path = by_callback
    image = parts / "bad" / "00.png"
    expected = answers(model, image, tmp_path)
    assert torch.load(path, weights_only=True)["sgfr_tiling"] == {
        "tile": [48, 48],
        "step": [48, 48],
    }
    for other in (
        Sgfr.load_from_checkpoint(path),
        Sgfr(layers=_LAYERS, visualizer=False),
        framed(tile_size=(48, 48), tile_stride=48),
    ):
        for callbacks in (
            [],
            [tiler()],
            [TilerConfigurationCallback(tile_size=64)],
        ):  # the last is not enabled
            assert torch.equal(answers(other, image, tmp_path, path, callbacks=callbacks), expected)
    assert torch.equal(answers(Sgfr.load_from_checkpoint(path), image, tmp_path), expected)


@pytest.mark.parametrize(
    ("arguments", "callback", "message"),
    [
        (
            {},
            {"stride": 32},
            "fitted with tiles of 48 x 48 every 48 x 48 pixels, tiles of 48 x 48 every 32 x 32",
        ),
        (
            {"tile_size": 32},
            None,
            "fitted with tiles of 48 x 48 every 48 x 48 pixels, tiles of 32 x 32 every 32 x 32",
        ),
        (
            {"tile_size": 32},
            {},
            "arguments ask for tiles of 32 x 32.*Callback for tiles of 48 x 48.*leave one out",
        ),
        ({}, {"remove_border_count": 1}, "remove_border_count must be 0, got 1"),
        ({}, {"tile_size": 50}, r"tile_size must be a multiple of 16.*\(48, 48\) would do"),
    ],
)
def test_other_tiles_than_those_learnt_with_are_refused(
    arguments: dict[str, object],
    callback: dict[str, object] | None,
    message: str,
    by_callback: tuple[Sgfr, Path],
    parts: Path,
    tmp_path: Path,
) -> None:
    image, callbacks = parts / "bad" / "00.png", [] if callback is None else [tiler(**callback)]
    with pytest.raises(ValueError, match=message):
        answers(framed(**arguments), image, tmp_path, by_callback[1], callbacks=callbacks)
    if callback is None:
        with pytest.raises(ValueError, match=message):
            Sgfr.load_from_checkpoint(by_callback[1], **arguments)
    else:  # a model at hand is left as it was
        model = Sgfr.load_from_checkpoint(by_callback[1])
        model._inputs.tiling = None if not arguments else Tiling((32, 32), (32, 32))
        with pytest.raises(ValueError, match=message):
            answers(model, image, tmp_path, callbacks=callbacks)
        assert Tiling.from_tiler(model.model.tiler) == _TILES


def test_tiles_for_what_was_learnt_without_are_refused(parts: Path, tmp_path: Path) -> None:
    model = framed()
    path = fitted(tmp_path, model, parts)
    with pytest.raises(ValueError, match="was fitted without tiles, tiles of 48 x 48"):
        answers(framed(), parts / "bad" / "00.png", tmp_path, path, callbacks=[tiler()])
    with pytest.raises(ValueError, match="was fitted without tiles, tiles of 48 x 48"):
        answers(model, parts / "bad" / "00.png", tmp_path, callbacks=[tiler()])
    assert model.model.tiler is None
    with pytest.raises(
        ValueError, match="was fitted at an image_size of 96 x 96, 64 x 64 is asked for"
    ):
        Sgfr.load_from_checkpoint(path, image_size=64)
    with pytest.raises(
        ValueError, match="was fitted at an image_size of 96 x 96, 64 x 64 is asked for"
    ):
        answers(framed(image_size=64), parts / "bad" / "00.png", tmp_path, path)
    with pytest.raises(ValueError, match=r"was fitted without a roi, 'new.png' is asked for"):
        Sgfr.load_from_checkpoint(path, roi="new.png")
    state = torch.load(path, weights_only=True)
    del state["sgfr_tiling"], state["state_dict"]["model.region"]  # of a version that kept neither
    torch.save(state, tmp_path / "earlier.ckpt")
    plain = answers(framed(), parts / "bad" / "00.png", tmp_path, tmp_path / "earlier.ckpt")
    tiled = answers(
        framed(), parts / "bad" / "00.png", tmp_path, tmp_path / "earlier.ckpt", callbacks=[tiler()]
    )
    assert not torch.equal(plain, tiled)


def test_an_update_keeps_to_what_it_adds_to(
    masked: tuple[Sgfr, Path, Path],
    by_callback: tuple[Sgfr, Path],
    parts: Path,
    tmp_path: Path,
    datamodule: Folder,
) -> None:
    _, path, mask = masked
    for arguments, message in (
        ({"tile_size": 32}, "fitted with tiles of 48 x 48 every 48 x 48 pixels, tiles of 32 x 32"),
        ({"roi": str(parts / "masks" / "00.png")}, "fitted with another roi than"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_in(tmp_path).fit(
                framed(update=True, **arguments), datamodule=datamodule, ckpt_path=path
            )
    updated = framed(update=True, roi=str(mask))  # the same, from another place
    engine_in(tmp_path).fit(updated, datamodule=datamodule, ckpt_path=path)
    assert Tiling.from_tiler(updated.model.tiler) == _TILES
    assert bool((updated.model.region[:, :64] == 1).all())
    assert not bool(updated.model.region[:, 64:].any())
    held = Sgfr.load_from_checkpoint(by_callback[1], update=True)
    with pytest.raises(
        ValueError,
        match="fitted with tiles of 48 x 48 every 48 x 48 pixels, tiles of 48 x 48 every 16",
    ):
        fit(held, datamodule, tmp_path, callbacks=[tiler(stride=16)])


def test_a_fit_that_fails_leaves_what_was_learnt_with(
    by_callback: tuple[Sgfr, Path],
    parts: Path,
    datamodule: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Sgfr.load_from_checkpoint(by_callback[1])
    expected = answers(model, parts / "bad" / "00.png", tmp_path)
    monkeypatch.setattr("anomalib_sgfr.training.fit.fit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(model, datamodule, tmp_path, callbacks=[tiler(stride=16)])
    assert Tiling.from_tiler(model.model.tiler) == _TILES
    assert torch.equal(answers(model, parts / "bad" / "00.png", tmp_path), expected)


@pytest.mark.parametrize("make", [lambda _: None, lambda path: Image.new("L", (96, 96)).save(path)])
def test_a_region_that_cannot_be_used_is_refused_before_the_fit(
    make: Callable[[Path], None], datamodule: Folder, tmp_path: Path
) -> None:
    make(tmp_path / "mask.png")
    model = framed(roi=str(tmp_path / "mask.png"))
    with pytest.raises(ValueError, match=r"mask.png' (cannot be read|leaves nothing to inspect)"):
        fit(model, datamodule, tmp_path)
    assert not model._callbacks.sampling.samplers


def test_what_lies_outside_the_region_is_neither_learnt_nor_scored(
    masked: tuple[Sgfr, Path, Path], parts: Path, tmp_path: Path
) -> None:
    model, path, _ = masked
    for bank, columns in zip(model.model.banks, (8, 4), strict=True):
        assert bank.origin[:, 2].max() == columns - 1
        assert int(bank.count.sum()) == 12 * columns * (
            96 * columns // 64
        )  # of 12 images, two thirds of the rows
    image = read_image(parts / "good_test" / "00.png").astype(np.float32)
    rng = np.random.default_rng(0)
    found = []
    for name in ("a", "b"):
        printed = image.copy()
        printed[4:30, 64:94] = rng.random((26, 30, 1)) > 0.5  # a number that differs on each part
        Image.fromarray((printed * 255).round().astype(np.uint8)).save(tmp_path / f"{name}.png")
        found.append(answers(Sgfr.load_from_checkpoint(path), tmp_path / f"{name}.png", tmp_path))
    assert torch.equal(found[0], found[1])
    restored = Sgfr.load_from_checkpoint(path).eval()
    raw = restored.model(
        restored.pre_processor.transform(torch.from_numpy(image).permute(2, 0, 1)[None])
    ).anomaly_map
    assert bool((raw[..., 64:] == 0).all())
    assert bool((raw[..., :64] > 0).all())
    explained = explain(
        restored.model, restored.pre_processor.transform(torch.from_numpy(image).permute(2, 0, 1))
    )
    assert all(region.column < 8 for region in explained.regions)


def test_a_region_is_kept_whole_and_another_refused(
    masked: tuple[Sgfr, Path, Path], parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path, mask = masked
    image = parts / "bad" / "00.png"
    expected = answers(model, image, tmp_path)
    with caplog.at_level(logging.WARNING):
        for other in (Sgfr.load_from_checkpoint(path), framed(roi=str(mask)), framed()):
            assert torch.equal(answers(other, image, tmp_path, path), expected)
    assert "roi" not in caplog.text
    for other in ("nowhere.png", str(parts / "masks" / "00.png")):
        with pytest.raises(
            ValueError, match=r"roi '.*nowhere.png' cannot be read|fitted with another roi than"
        ):
            Sgfr.load_from_checkpoint(path, roi=other)
    original = Path(model.hparams["roi"])
    Image.new("L", (96, 96), 255).save(original)
    try:
        with caplog.at_level(logging.WARNING):
            assert torch.equal(answers(Sgfr.load_from_checkpoint(path), image, tmp_path), expected)
    finally:
        original.unlink()
    assert "has changed since the fit: the region of the fit stays in use" in caplog.text


def test_a_defect_outside_the_region_is_no_alarm(
    masked: tuple[Sgfr, Path, Path], tmp_path: Path
) -> None:
    write_image(tmp_path / "plain.png", 300)
    plain = np.asarray(Image.open(tmp_path / "plain.png")).copy()
    scores = {}
    for name, columns in (
        ("outside", slice(64, 96)),
        ("inside", slice(20, 52)),
        ("none", slice(0, 0)),
    ):
        marked = plain.copy()
        marked[30:60, columns] = 250
        Image.fromarray(marked).save(tmp_path / f"{name}.png")
        model = masked[0].eval()
        image = model.pre_processor.transform(read_image(tmp_path / f"{name}.png", as_tensor=True))[
            None
        ]
        scores[name] = float(model.model(image).pred_score)
    assert scores["outside"] == scores["none"] < scores["inside"] / 2
