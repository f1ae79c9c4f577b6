"""A checkpoint of other arguments is refused by name, unless it was asked for."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.metrics import Evaluator, F1Score
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Resize, Transform, functional

from anomalib_sgfr import Sgfr
from anomalib_sgfr.memory_bank import MemoryBank
from anomalib_sgfr.training.checkpoint import damage
from tests.conftest import engine_in, fit, folder_datamodule, small

SMALL_IMAGES = Sgfr.configure_pre_processor((64, 64))


class Mirrored(Transform):
    """A user's own, of which anomalib knows nothing."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        del params
        return functional.horizontal_flip(functional.resize(inpt, [64, 64]))


@pytest.fixture(scope="module")
def checkpoint(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small(
        pre_processor=SMALL_IMAGES, bank_size=50, solver="ridge", regularisation=0.01, blur=2.0
    )
    return Path(
        str(fit(model, folder_datamodule(parts), tmp_path_factory.mktemp("ridge")).best_model_path)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "fitted with solver 'ridge', the model has 'affine': pass --model.solver ridge"),
        (
            {"solver": "ridge"},
            (
                "fitted with regularisation '0.01', the model has '0.001': pass"
                " --model.regularisation 0.01"
            ),
        ),
        (
            {"solver": "ridge", "regularisation": 0.01},
            "fitted with blur '2.0', .* '4.0': pass --model.blur 2",
        ),
    ],
)
def test_what_scores_depend_on_is_refused_by_name(
    arguments: dict[str, object], message: str, checkpoint: Path, parts: Path, tmp_path: Path
) -> None:
    model = small(pre_processor=SMALL_IMAGES, bank_size=50, **arguments)
    with pytest.raises(ValueError, match=message):
        engine_in(tmp_path).predict(
            model, dataset=PredictDataset(parts / "bad"), ckpt_path=str(checkpoint)
        )


def test_what_scores_do_not_depend_on_may_differ(
    checkpoint: Path, parts: Path, tmp_path: Path
) -> None:
    model = small(
        pre_processor=SMALL_IMAGES,
        bank_size=70,
        num_atoms=2,
        solver="ridge",
        regularisation=0.01,
        blur=2.0,
        seed=5,
    )
    found = engine_in(tmp_path).predict(
        model, dataset=PredictDataset(parts / "bad"), ckpt_path=str(checkpoint)
    )
    assert len(found) == 6


def test_other_arguments_that_were_asked_for_take_effect(checkpoint: Path) -> None:
    """Scores and certificate are of one penalty, and a bank of one solver serves another."""
    images = torch.rand(1, 3, 64, 64)
    plain = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu")
    for changes in ({"regularisation": 0.5}, {"solver": "affine", "num_atoms": 3}):
        model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", **changes).eval()
        for bank, stored in zip(model.model.banks, plain.model.banks, strict=True):
            expected = MemoryBank(
                model.hparams.solver, model.hparams.num_atoms, model.hparams.regularisation
            )
            expected.set(*stored.state)
            patches = torch.randn(9, bank.atoms.shape[1])
            assert torch.equal(bank.residuals(patches), expected.residuals(patches))
            assert bank.certificate().largest == expected.certificate().largest
        with torch.no_grad():
            assert torch.isfinite(model.model(images).anomaly_map).all()
        assert not model.post_processor.is_set  # the threshold is of other scores
        assert model.post_processor.basis == "nothing: there is none"
    assert plain.post_processor.is_set


def test_another_blur_leaves_no_threshold(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = Sgfr.load_from_checkpoint(checkpoint, map_location="cpu", blur=3.0)
    assert not model.post_processor.is_set
    assert (
        "blur is 3.0, and was 2.0 in the fit: the threshold was chosen from other scores"
        in caplog.text
    )
    # what scores do not depend on, and what is as it was
    assert Sgfr.load_from_checkpoint(
        checkpoint, map_location="cpu", blur=2.0, seed=1, num_atoms=2
    ).post_processor.is_set


@pytest.mark.parametrize(
    "own",
    [
        Sgfr.configure_pre_processor((96, 96)),
        PreProcessor(Resize((64, 64), antialias=True)),
        PreProcessor(Mirrored()),
        PreProcessor(),
    ],
)
def test_another_pre_processor_is_refused(
    own: PreProcessor, checkpoint: Path, parts: Path, tmp_path: Path
) -> None:
    model = small(pre_processor=own, bank_size=50, solver="ridge", regularisation=0.01, blur=2.0)
    transform = own.transform
    with pytest.raises(ValueError, match=r"fitted with another pre_processor: .* It had Compose\("):
        engine_in(tmp_path).predict(
            model, dataset=PredictDataset(parts / "bad"), ckpt_path=str(checkpoint)
        )
    assert model.pre_processor is own
    assert own.transform is transform  # as it was


def test_a_pre_processor_for_what_was_fitted_without_is_refused(
    parts: Path, tmp_path: Path
) -> None:
    path = str(
        fit(
            small(pre_processor=False, bank_size=50), folder_datamodule(parts), tmp_path
        ).best_model_path
    )
    other = small(pre_processor=SMALL_IMAGES, bank_size=50)
    with pytest.raises(ValueError, match=r"fitted with another pre_processor: .* It had none"):
        engine_in(tmp_path).predict(other, dataset=PredictDataset(parts / "bad"), ckpt_path=path)
    assert other.pre_processor is SMALL_IMAGES


def test_a_transform_that_no_checkpoint_keeps_is_asked_for_again(
    parts: Path, tmp_path: Path
) -> None:
    def mirrored() -> Sgfr:
        return small(pre_processor=PreProcessor(Mirrored()), bank_size=50)

    model = mirrored()
    path = str(fit(model, folder_datamodule(parts), tmp_path).best_model_path)
    with pytest.raises(
        ValueError, match=r"that no checkpoint can keep: pass it again. It did Mirrored\("
    ):
        Sgfr.load_from_checkpoint(path)
    image = PredictDataset(parts / "bad" / "00.png")
    scores = [
        float(engine_in(tmp_path).predict(each, dataset=image, ckpt_path=path)[0].pred_score)
        for each in (mirrored(), model)
    ]
    assert scores[0] == scores[1]


def test_a_metric_of_labels_in_validation_is_explained(parts: Path, tmp_path: Path) -> None:
    model = small(
        evaluator=Evaluator(val_metrics=[F1Score(fields=["pred_label", "gt_label"])]), image_size=64
    )
    with pytest.raises(ValueError, match="pred_label") as caught:
        fit(model, folder_datamodule(parts), tmp_path)
    assert any(
        "Put F1Score and the like into test_metrics" in note for note in caught.value.__notes__
    )


def test_a_changed_byte_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"atoms": torch.zeros(1000)}, file)
    assert damage(file) is None
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    assert "is damaged: the checksum of" in str(damage(file))
    entry = whole.index(b"PK\x01\x02")  # of the archive's directory
    # bytes of its entries that name an unknown compression, another one, a password
    for byte, value in ((10, 99), (10, 8), (8, 1)):
        changed = whole.copy()
        while entry > 0:
            changed[entry + byte] = value
            entry = changed.find(b"PK\x01\x02", entry + 1)
        entry = whole.index(b"PK\x01\x02")
        file.write_bytes(changed)
        assert "is not a whole checkpoint" in str(damage(file))


@pytest.mark.parametrize("seed", ["a", 1.5, 2**64])
def test_a_seed_that_is_no_whole_number_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number of 64 bits, got "):
        small(seed=seed)
