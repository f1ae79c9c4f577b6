"""``anomalib-sgfr reject``: patches of missed defects, which can be taken back exactly."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_sgfr import Sgfr, explain
from anomalib_sgfr.cli import accept, adapt, threshold
from anomalib_sgfr.cli.reject import main
from anomalib_sgfr.images.pre_processor import read_prepared
from anomalib_sgfr.post_processing.calibration import Split, nominal_scores
from anomalib_sgfr.training import reject
from tests.conftest import fit, folder_datamodule, small, write_image
from tests.threaded import in_threads

SMALL_IMAGES = Sgfr.configure_pre_processor((64, 64))
BOX = "8,40,17,16"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a fit to ``good`` with a threshold that misses ``faint``: good images with a
    faint cross, whose masks are in ``masks``; ``clear`` has a dark one elsewhere.
    """
    folder = tmp_path_factory.mktemp("reject")
    for index in range(12):
        write_image(folder / "good" / f"{index:02}.png", index, (64, 64))
    for index in range(4):
        write_image(folder / "new" / f"{index}.png", 300 + index, (64, 64))
        for name, value in (("faint", 90), ("clear", 10)):
            write_image(folder / name / f"{index}.png", 200 + index, (64, 64))
            cross(folder / name / f"{index}.png", value)
        mask = np.zeros((64, 64), np.uint8)
        mask[40:56, 8:25] = 255
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / f"{index}_mask.png")
    module = folder_datamodule(folder, abnormal_dir=None, normal_test_dir=None, mask_dir=None)
    model = small(bank_size=400, pre_processor=SMALL_IMAGES)
    engine = fit(model, module, folder, limit_val_batches=0)
    Path(str(engine.best_model_path)).replace(folder / "fitted.ckpt")
    faint = [score(loaded(folder / "fitted.ckpt"), path) for path in images(folder / "faint")]
    arguments = [folder / "fitted.ckpt", "--value", str(1.02 * max(faint))]
    assert threshold.main([*map(str, arguments), "--out", str(folder / "model.ckpt")]) == 0
    return folder


def cross(path: Path, value: int) -> None:
    """Draw a cross in the lower left quarter."""
    pixels = np.array(Image.open(path))
    pixels[40:56, 14:17] = pixels[46:49, 8:24] = value
    Image.fromarray(pixels).save(path)


def images(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def loaded(path: Path) -> Sgfr:
    return Sgfr.load_from_checkpoint(
        path, map_location="cpu", visualizer=False, evaluator=False
    ).eval()


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def score(model: Sgfr, path: Path) -> float:
    image = read_prepared(str(path), model.pre_processor)[None]
    with torch.no_grad():
        return float(model.model(image).pred_score)


@pytest.fixture(scope="module")
def taught(root: Path) -> Path:
    """The checkpoint after the first two faint images were rejected by their masks."""
    out = root / "taught.ckpt"
    given = [*images(root / "faint")[:2], "--masks", root / "masks", "--out", out]
    assert run(root / "model.ckpt", *given) == 0
    return out


def same_state(one: Sgfr, other: Sgfr) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value.nan_to_num(), theirs[name].nan_to_num()) for name, value in ours.items()
    )


def test_missed_defects_are_found_and_no_image_scores_less(root: Path, taught: Path) -> None:
    before, after = loaded(root / "model.ckpt"), loaded(taught)
    limit = after.post_processor.label_threshold
    assert limit == before.post_processor.label_threshold
    scores = {
        path: (score(before, path), score(after, path))
        for name in ("good", "new", "faint", "clear")
        for path in images(root / name)
    }
    assert all(now >= then for then, now in scores.values())
    faint = images(root / "faint")
    assert all(scores[path][0] <= limit < scores[path][1] for path in faint[:2])
    assert all(scores[path][1] > scores[path][0] for path in faint[2:])  # of the same kind
    known = after.post_processor.calibration_scores.good.paths
    assert len(known) == 10
    assert all(scores[Path(path)][0] == scores[Path(path)][1] for path in known)
    assert all(scores[path][1] <= limit for path in images(root / "new"))
    assert before.post_processor.checkpoint_config() == after.post_processor.checkpoint_config()
    assert after.certificate().largest_score >= before.certificate().largest_score


def test_python_learns_what_the_command_does(root: Path, taught: Path, tmp_path: Path) -> None:
    model = loaded(root / "model.ckpt")
    mask = np.array(Image.open(root / "masks" / "0_mask.png"))
    paths = [str(path) for path in images(root / "faint")[:2]]
    found = reject.reject(model, dict.fromkeys(paths, mask))
    assert [image.image for image in found.images] == paths
    assert all(image.before < image.now for image in found.images)
    assert (found.good, found.gone) == (10, 0)
    model.save_checkpoint(tmp_path / "saved.ckpt")
    saved, expected = loaded(tmp_path / "saved.ckpt"), loaded(taught)
    for bank, other in zip(saved.model.banks, expected.model.banks, strict=True):
        assert torch.equal(bank.defects.stored, other.defects.stored)
        assert torch.equal(bank.defects.limits, other.defects.limits)
    with pytest.raises(ValueError, match="the mask is 3 x 3 pixels, its image 64 x 64"):
        reject.reject(model, {str(images(root / "clear")[0]): np.ones((3, 3))})
    with pytest.raises(RuntimeError, match="not loaded from a checkpoint"):
        small().save_checkpoint(tmp_path / "other.ckpt")


def test_an_explanation_names_the_rejected_defect(root: Path, taught: Path) -> None:
    model = loaded(taught)
    path = images(root / "faint")[0]
    image = read_prepared(str(path), model.pre_processor)
    (region,) = explain(model.model, image, 1).regions
    raised = [part for part in region.reconstructions if part.resembles]
    assert raised
    assert all(part.raised > 1.0 for part in raised)
    assert all(part.resembles.startswith("rejected defect 1 of 20") for part in raised)
    assert all(part.resembles.endswith(", 0.png") for part in raised)
    assert "as it resembles rejected defect 1" in raised[0].residual_text
    good = read_prepared(str(images(root / "good")[0]), model.pre_processor)
    (region,) = explain(model.model, good, 1).regions
    assert not any(part.resembles for part in region.reconstructions)


def test_rejected_images_are_listed_and_taken_back(
    root: Path, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second.ckpt"
    path = images(root / "faint")[2]
    assert run(taught, path, "--region", BOX, "--out", second) == 0
    capsys.readouterr()
    assert run(second) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(".")[0] for line in listed] == ["1", "2", "3"]
    assert str(path) in listed[2]
    states = [loaded(taught), loaded(root / "model.ckpt")]
    dates = [image.partition(" ")[0] for image in loaded(second).model.rejected]
    assert len(set(dates)) == 2  # also within one second
    for expected in states:
        assert run(second, "--undo", "--out", second) == 0
        back = loaded(second)
        assert back.model.rejected == expected.model.rejected
        for path in (*images(root / "good"), *images(root / "clear")):
            assert score(back, path) == score(expected, path)
    assert same_state(loaded(second), loaded(root / "model.ckpt"))
    with pytest.raises(ValueError, match="there is nothing to take back"):
        run(second, "--undo")


@pytest.mark.parametrize(
    ("first", "second"), [("box", "box"), ("box", "--yes"), ("--yes", "--yes"), ("masks", "masks")]
)
def test_an_image_that_was_rejected_adds_nothing_again(
    first: str, second: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = {"box": ["--region", BOX], "--yes": ["--yes"], "masks": ["--masks", root / "masks"]}
    path, copied = images(root / "faint")[0], tmp_path / "0.png"
    shutil.copy(path, copied)
    once, twice = tmp_path / "once.ckpt", tmp_path / "twice.ckpt"
    assert run(root / "model.ckpt", path, *ways[first], "--out", once) == 0
    (date,) = (image.partition(" ")[0] for image in loaded(once).model.rejected)
    for same in (path, copied):
        capsys.readouterr()
        assert run(once, same, *ways[second], "--out", twice) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{same}: was rejected already, {date}: nothing to add. --region or")
        assert said.endswith("\nNothing was added.\n")
        assert not twice.exists()


def test_others_beside_a_rejected_image_are_learned_from(
    root: Path, taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = [str(path) for path in images(root / "faint")[1:3]], tmp_path / "out.ckpt"
    assert run(taught, *paths, "--yes", "--out", out) == 0
    said = capsys.readouterr().out
    assert f"{paths[0]}: was rejected already" in said
    assert "Nothing was added" not in said
    rejected = [image.partition(" ")[2] for image in loaded(out).model.rejected]
    assert rejected[1:] == paths


def test_another_region_of_a_rejected_image_adds_its_own_patches(root: Path) -> None:
    path = str(images(root / "clear")[0])
    upper, whole = np.zeros((2, 64, 64), bool)
    upper[40:48, 8:25] = whole[40:56, 8:25] = True
    model, expected = (loaded(root / "model.ckpt") for _ in range(2))
    reject.reject(model, {path: upper})
    reject.reject(model, {path: whole})
    (repeated,) = reject.reject(model, {path: whole}).images
    assert repeated.known_since == model.model.rejected[1].partition(" ")[0]
    assert repeated.patches == [0] * len(model.model.banks)
    assert repeated.before == repeated.now
    reject.reject(expected, {path: whole})
    for bank, other in zip(model.model.banks, expected.model.banks, strict=True):
        ours, theirs = (
            {tuple(place) for place in part.defects.origin[:, 1:].tolist()}
            for part in (bank, other)
        )
        assert ours == theirs
        assert bank.defects.size == other.defects.size


def test_without_a_region_the_worst_is_shown_and_nothing_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.ckpt"
    path = images(root / "clear")[0]
    assert run(root / "model.ckpt", path, "--out", out) == 0
    said = capsys.readouterr().out
    assert not out.exists()
    box = said.split("--region ")[1].split(",")[:4]
    left, top, width, height = (int(value.split()[0]) for value in box)
    assert left <= 15 <= left + width
    assert top <= 47 <= top + height
    drawn = np.asarray(Image.open(tmp_path / "new_regions" / "1_0.png"))
    assert drawn.shape == (64, 64, 3)
    assert (drawn == (0, 255, 255)).all(2).any()
    assert run(root / "model.ckpt", path, "--yes", "--out", out) == 0
    assert loaded(out).model.rejected[0].endswith(f" {path}")


def test_calibration_images_that_are_gone_are_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = loaded(root / "model.ckpt").post_processor.calibration_scores.good.paths
    moved = Path(known[0]).rename(tmp_path / "moved.png")
    given = [images(root / "faint")[0], "--region", BOX, "--out", tmp_path / "new.ckpt"]
    try:
        assert run(root / "model.ckpt", *given) == 0
        said = capsys.readouterr()
        assert "The scores of 9 known good images stay" in said.out
        assert "warning: 1 of the 10 images that the threshold is calibrated on" in said.err
    finally:
        moved.rename(known[0])


def test_acceptance_and_rejection_are_taken_back_in_any_order(root: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.png"
    shutil.copy(images(root / "new")[0], odd)
    pixels = np.array(Image.open(odd))
    pixels[8:20, 40:56] = 255
    Image.fromarray(pixels).save(odd)
    file = tmp_path / "model.ckpt"
    steps = [
        lambda: accept.main([str(root / "model.ckpt"), str(odd), "--out", str(file)]),
        lambda: run(file, images(root / "faint")[0], "--masks", root / "masks", "--out", file),
    ]
    for step in steps:
        assert step() == 0
    both = loaded(file)
    assert both.accepted is not None
    assert len(both.model.rejected) == 1
    assert accept.main([str(file), "--undo", "--out", str(file)]) == 0
    rejected = loaded(file)
    assert rejected.accepted is None
    plain = loaded(root / "model.ckpt")
    for bank, ours, theirs in zip(
        rejected.model.banks, both.model.banks, plain.model.banks, strict=True
    ):
        assert torch.equal(bank.defects.stored, ours.defects.stored)
        assert torch.equal(bank.stored, theirs.stored)
    assert run(file, "--undo", "--out", file) == 0
    assert same_state(loaded(file), plain)


def test_adapt_and_update_keep_the_defects(root: Path, taught: Path, tmp_path: Path) -> None:
    adapted = tmp_path / "adapted.ckpt"
    assert adapt.main([str(taught), str(root / "new"), "--out", str(adapted)]) == 0
    before, after = loaded(taught), loaded(adapted)
    assert after.model.rejected == before.model.rejected
    for bank, old in zip(after.model.banks, before.model.banks, strict=True):
        assert bank.defects.size == old.defects.size > 0
        assert (bank.defects.stored @ bank.nuisance.T).abs().max() < 1e-3
    model = updated(taught, root, tmp_path, normal_dir="new")
    assert model.model.rejected == before.model.rejected
    for bank, old in zip(model.model.banks, before.model.banks, strict=True):
        assert torch.equal(bank.defects.stored, old.defects.stored)


def updated(taught: Path, root: Path, folder: Path, **settings: object) -> Sgfr:
    """The rejected checkpoint, without a threshold set by hand, after an update."""
    data = {"mask_dir": None, "normal_test_dir": None, "abnormal_dir": None, **settings}
    model = small(bank_size=400, pre_processor=SMALL_IMAGES, update=True)
    checkpoint = torch.load(taught, map_location="cpu", weights_only=False)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    processor = model.post_processor
    processor.use(processor.state._replace(value=None).calibrated())
    validates = 0 if data["normal_test_dir"] is None else 1.0
    fit(model, folder_datamodule(root, **data), folder, limit_val_batches=validates)
    return model


def by_accept(taught: Path, root: Path, folder: Path) -> Sgfr:
    out = folder / "out.ckpt"
    assert threshold.main([str(taught), "--value", "0.3", "--out", str(out)]) == 0
    accept.main([str(out), str(root / "alike"), "--out", str(out)])
    assert loaded(out).accepted
    return loaded(out)


def by_taking_back(taught: Path, root: Path, folder: Path) -> Sgfr:
    """Accepted before the rejection, whose limits were found beside the new atoms."""
    del taught
    out = folder / "out.ckpt"
    base = ["--value", "0.3", "--out", str(out)]
    assert threshold.main([str(root / "model.ckpt"), *base]) == 0
    accept.main([str(out), *map(str, images(root / "good")), "--force", "--out", str(out)])
    given = [*images(root / "faint")[:2], "--masks", root / "masks", "--out", out]
    assert run(out, *given) == 0
    assert accept.main([str(out), "--undo", "--out", str(out)]) == 0
    return loaded(out)


def by_adapt(taught: Path, root: Path, folder: Path) -> Sgfr:
    out = folder / "out.ckpt"
    assert adapt.main([str(taught), str(root / "alike"), "--out", str(out)]) == 0
    return loaded(out)


def by_held_out(taught: Path, root: Path, folder: Path) -> Sgfr:
    out = folder / "out.ckpt"
    given = [str(taught), "--held_out", str(root / "alike"), "--out", str(out)]
    assert threshold.main(given) == 0
    return loaded(out)


def by_group(taught: Path, root: Path, folder: Path) -> Sgfr:
    del root
    out = folder / "out.ckpt"
    assert threshold.main([str(taught), "--group", r"good/\d", "--out", str(out)]) == 0
    return loaded(out)


def by_update(taught: Path, root: Path, folder: Path) -> Sgfr:
    return updated(taught, root, folder, normal_dir="alike")


def by_validation(taught: Path, root: Path, folder: Path) -> Sgfr:
    data = {"normal_dir": "new", "normal_test_dir": "alike", "abnormal_dir": "clear"}
    model = updated(taught, root, folder, **data)
    assert Split.HELD_OUT in model.post_processor.calibration_scores.kinds
    return model


@pytest.mark.parametrize(
    "changed",
    [by_accept, by_taking_back, by_adapt, by_held_out, by_group, by_update, by_validation],
)
def test_no_score_of_a_good_image_is_raised_whatever_changes_the_model(
    changed: Callable[[Path, Path, Path], Sgfr], root: Path, taught: Path, tmp_path: Path
) -> None:
    for index in range(6):  # good images with something like the defect
        path = root / "alike" / f"{index}.png"
        if not path.exists():
            write_image(path, 400 + index, (64, 64))
            cross(path, 60 + 5 * index)
    model = changed(taught, root, tmp_path).eval()
    own, state = model.model, model.post_processor.state
    assert len(own.rejected) == 2
    plain = own.with_banks(own.fitted_state.without_defects())
    steps = model.accepted.steps if model.accepted else ()
    accepted = [part.image for step in steps for part in step.additions]
    for paths, leave_out in ((state.scores.good.paths, True), (accepted, False)):
        now, before = (
            nominal_scores(each, model.pre_processor, paths, leave_out=leave_out, group=state.group)
            for each in (own, plain)
        )
        assert now == before
    if state.by == "good":
        assert state.calibrated().image == state.image
    old = loaded(taught).model
    for bank, earlier in zip(own.banks, old.banks, strict=True):
        if changed is not by_taking_back:
            assert torch.all(bank.defects.limits >= earlier.defects.limits)


@pytest.mark.parametrize("number", [2, 4])  # fewer than processes, and more
def test_processes_that_share_the_images_raise_the_same_limits(
    root: Path, taught: Path, number: int
) -> None:
    alone = loaded(taught)
    before = [bank.defects.limits for bank in alone.model.banks]
    paths = [str(path) for path in images(root / "faint")[-number:]]
    assert reject.hold_limits(alone.model, alone.pre_processor, paths)
    models = [loaded(taught) for _ in range(3)]
    raised = in_threads(
        lambda rank: reject.hold_limits(models[rank].model, alone.pre_processor, paths),
        limit=120.0,
    )
    assert raised == [True] * 3
    for number_of, expected in enumerate(alone.model.banks):
        found = [model.model.banks[number_of].defects.limits for model in models]
        assert all(torch.equal(limits, found[0]) for limits in found)
        assert torch.allclose(found[0], expected.defects.limits, atol=1e-3)
        assert torch.all(found[0] >= before[number_of])


def test_a_new_fit_knows_no_defects(root: Path, taught: Path, tmp_path: Path) -> None:
    model = loaded(taught)
    module = folder_datamodule(root, abnormal_dir=None, normal_test_dir=None, mask_dir=None)
    fit(model, module, tmp_path, limit_val_batches=0)
    assert model.model.rejected == []
    assert not any(bank.defects.size for bank in model.model.banks)


def encoded_again(path: Path, file: Path) -> Path:
    """The same pixels in a file of other bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.open(path).save(file, compress_level=1)
    return file


def test_good_images_that_show_the_defect_are_refused(
    root: Path, taught: Path, tmp_path: Path
) -> None:
    first, other = images(root / "faint")[0], images(root / "clear")[0]
    given = [taught, other, "--region", BOX, "--out", tmp_path / "out.ckpt", "--good"]
    copy = tmp_path / "copy.png"
    shutil.copy(other, copy)
    with pytest.raises(ValueError, match=r"copy.png cannot be taken for a good image: it is rejec"):
        run(*given, copy)
    with pytest.raises(
        ValueError, match=r"0.png cannot be taken for a good image: it was rejected"
    ):
        run(*given, first)
    again = encoded_again(other, tmp_path / "again.png")
    with pytest.raises(ValueError, match=r"again.png is known to be good and shows the same patch"):
        run(*given, again)
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize("command", [accept, adapt, threshold])
def test_a_rejected_image_is_no_good_one(
    command: object,
    root: Path,
    taught: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Unless by ``--force``, which ends what is raised for it, with a warning."""
    rejected = images(root / "faint")[0]
    path = tmp_path / "good" / "copy.png"
    path.parent.mkdir()
    shutil.copy(rejected, path)
    out = tmp_path / "out.ckpt"
    more = [*images(root / "new")] if command is adapt else []
    given = [taught, "--held_out", path.parent] if command is threshold else [taught, path, *more]
    arguments = [*map(str, given), "--out", str(out)]
    try:
        refused = command.main(arguments)  # type: ignore[attr-defined]
        said = capsys.readouterr().err
    except ValueError as error:
        refused, said = 1, str(error)
    assert refused == 1
    assert "it was rejected as a defect" in said
    assert not out.exists()
    assert command.main([*arguments, "--force"]) == 0  # type: ignore[attr-defined]
    assert "show the same patches as defects rejected" in caplog.text
    found = loaded(out)
    plain = found.model.with_banks(found.model.fitted_state.without_defects())
    image = read_prepared(str(path), found.pre_processor)[None]
    with torch.no_grad():
        expected = float(plain.eval()(image).pred_score)
        # rounding alone tells patches from those of the same image
        assert float(found.model(image).pred_score) == pytest.approx(expected, rel=0.01)
    assert run(out, "--undo") == 0


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("mask.png", TypeError, "the mask must be an array or a tensor, or None, got str"),
        (np.zeros((64, 64)), ValueError, "its region is empty: the mask is black"),
        (np.eye(64)[::-1].copy(), ValueError, "its region lies outside of what the model inspects"),
        (np.ones((64, 64, 3)), ValueError, "the mask is 64 x 64 x 3 pixels, its image 64 x 64"),
    ],
)
def test_a_region_that_cannot_be_is_named(
    mask: object, error: type[Exception], message: str, root: Path
) -> None:
    model = loaded(root / "model.ckpt")
    model.model.region = torch.zeros((64, 64), dtype=torch.uint8)
    model.model.region[:30, :30] = 1
    with pytest.raises(error, match=f"0.png: {message}"):
        reject.reject(model, {str(images(root / "clear")[0]): mask})
    with pytest.raises(ValueError, match="regions must name at least one image, got none"):
        reject.reject(model, {})


def test_a_rejection_raises_no_score_of_an_accepted_image(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd, alike = tmp_path / "odd.png", tmp_path / "alike.png"
    for number, path in enumerate((odd, alike)):
        shutil.copy(images(root / "new")[number], path)
        pixels = np.array(Image.open(path))
        pixels[8:20, 40:56] = 255
        Image.fromarray(pixels).save(path)
    accepted, rejected = tmp_path / "accepted.ckpt", tmp_path / "rejected.ckpt"
    assert accept.main([str(root / "model.ckpt"), str(odd), "--out", str(accepted)]) == 0
    before = score(loaded(accepted), odd)
    assert run(accepted, alike, "--region", "40,8,16,12", "--out", rejected) == 0
    assert "The scores of 11 known good images stay" in capsys.readouterr().out
    assert score(loaded(rejected), odd) == before


def test_a_mask_is_found_in_the_folder_of_its_kind(root: Path, tmp_path: Path) -> None:
    """Each kind has an image of this name, as in MVTec AD."""
    for kind, number in (("cross", 0), ("other", 1)):
        (tmp_path / "test" / kind).mkdir(parents=True)
        shutil.copy(root / "faint" / f"{number}.png", tmp_path / "test" / kind / "000.png")
        (tmp_path / "ground_truth" / kind).mkdir(parents=True)
    shutil.copy(root / "masks" / "0_mask.png", tmp_path / "ground_truth" / "cross" / "000_mask.png")
    masks, out = ["--masks", tmp_path / "ground_truth"], ["--out", tmp_path / "out.ckpt"]
    with pytest.raises(ValueError, match=r"other/000.png: there is no mask for it, named 000 or"):
        run(root / "model.ckpt", tmp_path / "test" / "other" / "000.png", *masks, *out)
    shutil.copy(root / "masks" / "1_mask.png", tmp_path / "ground_truth" / "other" / "000_mask.png")
    assert run(root / "model.ckpt", tmp_path / "test" / "cross" / "000.png", *masks, *out) == 0


def test_an_interruption_leaves_the_checkpoint(
    taught: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = taught.read_bytes()
    monkeypatch.setattr(reject, "find_limits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(taught, images(root / "faint")[3], "--region", BOX, "--out", taught)
    assert taught.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["good/00.png", "--region", BOX], "calibrated on it as a good image"),
        (["clear/0.png", "--region", "60,60,9,9"], "the box does not lie within"),
        (["clear/0.png", "--masks", "good"], "2 masks|there is no mask for it"),
        (["clear/0.png", "--masks", "black"], "shows no defect: its brightest pixel is 0"),
        (
            ["clear/0.png", "--masks", "photographs"],
            "0.png' is no mask: .*% of its pixels are grey",
        ),
        (["clear/0.png", "--masks", "large"], "is 80 x 64 pixels, its image 64 x 64"),
    ],
)
def test_what_cannot_be_used_is_refused(
    root: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    for name, shape in (("black", (64, 64)), ("large", (80, 64))):
        (tmp_path / name).mkdir()
        pixels = np.full(shape, 255 * (name == "large"), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    write_image(tmp_path / "photographs" / "0.png", 5, (64, 64))
    given = [
        str((root if (root / item).exists() else tmp_path) / item)
        if "/" in item or item in {"good", "black", "large", "photographs"}
        else item
        for item in arguments
    ]
    with pytest.raises(ValueError, match=said):
        run(root / "model.ckpt", *given, "--out", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["clear", "--region", BOX], "--region is of one image, there are 4"),
        (["clear", "--undo"], "pass no images with it"),
        (["clear/0.png", "--region", "1,2,3"], "must be four integers X,Y,W,H"),
        (["--yes"], "--yes goes with images, and there are none"),
        (["--masks", "clear"], "--masks goes with images"),
        (["--good", "clear", "--undo"], "--good goes with images"),
        (["--out", "clear.ckpt"], "--out goes with images"),
    ],
)
def test_wrong_arguments_end_with_code_2(
    root: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(root / item) if item.startswith("clear") else item for item in arguments]
    with pytest.raises(SystemExit) as end:
        run(root / "model.ckpt", *given)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
