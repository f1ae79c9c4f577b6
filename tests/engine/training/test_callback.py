"""What the sampling callback is given, what it makes of it, and what it asks of a trainer."""

import itertools
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from anomalib_sgfr import Sgfr, SubspaceSampling
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.features.embedding import PatchEmbedder
from anomalib_sgfr.training import callback as callbacks
from tests.conftest import atoms, fit, folder_datamodule, small


@pytest.mark.parametrize("new", [[True, True, True], [True, False, True], [False, False, True]])
@pytest.mark.parametrize("copies", [1, 4])
def test_every_patch_of_a_copy_belongs_to_its_image(copies: int, new: list[bool]) -> None:
    """Copies come one after the other, each of all images."""
    numbers, grid = torch.tensor([5, 7, 9]), (2, 3)
    images = torch.cat(
        [torch.cartesian_prod(number[None], *map(torch.arange, grid)) for number in numbers]
    )
    maps = images.reshape(3, *grid, 3).permute(0, 3, 1, 2).float()
    every = torch.cat(
        [torch.cat((maps, torch.full_like(maps[:, :1], copy)), 1) for copy in range(copies)]
    )
    sampling = SubspaceSampling()
    sampling.samplers = [SubspaceSampler(500), SubspaceSampler(500)]
    mask = torch.tensor([[True, True, False], [False, True, True]])
    sampling._observe([every, every], ["a", "b", "c"], numbers, torch.tensor(new), [None, mask])
    for sampler, inside in zip(sampling.samplers, (6, 4), strict=True):
        clusters = sampler.clusters()
        assert len(clusters.atoms) == copies * sum(new) * inside
        assert torch.equal(clusters.origin[:, :3], clusters.atoms[:, :3].int())
        assert set(clusters.origin[:, 0].tolist()) == {
            int(n) for n, its in zip(numbers, new, strict=True) if its
        }
        assert set(clusters.atoms[:, 3].tolist()) == set(range(copies))


@pytest.mark.parametrize("beside", [False, True])
def test_embeddings_that_are_overwritten_by_the_next_batch_were_learnt_from(
    beside: bool, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiled backbone's are, which has one memory for what it gives."""
    embed, buffers, may_start = PatchEmbedder.forward, {}, threading.Event()

    def reusing(self: PatchEmbedder, images: torch.Tensor) -> list[torch.Tensor]:
        found = embed(self, images)
        kept = buffers.setdefault(images.shape, [part.clone() for part in found])
        return [buffer.copy_(part) for buffer, part in zip(kept, found, strict=True)]

    def late(self: SubspaceSampling, *rest: Any) -> None:
        may_start.wait(0.5)
        observe(self, *rest)

    found = []
    for reuse in (False, True):
        monkeypatch.undo()
        observe = SubspaceSampling._observe
        monkeypatch.setattr(callbacks, "_on_gpu", lambda _: beside)
        if reuse:
            monkeypatch.setattr(PatchEmbedder, "forward", reusing)
            monkeypatch.setattr(SubspaceSampling, "_observe", late if beside else observe)
        model = small(image_size=64, seed=3)
        fit(model, folder_datamodule(parts), tmp_path)
        found.append(atoms(model))
    assert torch.equal(*found)


def test_batches_of_one_image_are_sampled_together(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    observe = SubspaceSampler.observe

    def observed(self: Any, patches: torch.Tensor, origin: torch.Tensor) -> None:
        if patches.shape[1] == 24:  # of one scale
            seen.append(sorted(set(origin[:, 0].tolist())))
            assert len(patches) == len(seen[-1]) * 64  # 8 x 8 patches an image
        observe(self, patches, origin)

    monkeypatch.setattr(SubspaceSampler, "observe", observed)
    monkeypatch.setattr(callbacks, "_JOINED", 5)
    for size, groups in ((1, [5, 5, 2]), (4, [4, 4, 4])):
        seen.clear()
        model = small(image_size=64, seed=3)
        fit(model, folder_datamodule(parts, train_batch_size=size), tmp_path)
        assert [len(images) for images in seen] == groups
        assert sorted(itertools.chain(*seen)) == list(range(12))


def plain(folder: Path, **arguments: Any) -> Trainer:
    """Lightning's own trainer, which knows nothing of the model's ``trainer_arguments``."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return Trainer(
        **{
            "num_sanity_val_steps": 0,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": folder,
            **quiet,
            **arguments,
        }
    )


def tiny(**arguments: Any) -> Sgfr:
    return small(image_size=64, seed=0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"val_check_interval": 0.5},
            r"val_check_interval must be 1\.0, got 0\.5: Sgfr learns from all training images",
        ),
        ({"val_check_interval": 1}, r"val_check_interval must be 1\.0, got 1:"),
        (
            {"val_check_interval": 2, "check_val_every_n_epoch": None},
            r"val_check_interval must be 1\.0, got 2:",
        ),
        ({"val_check_interval": "00:00:01:00"}, r"val_check_interval must be 1\.0, got a time"),
        (
            {"num_sanity_val_steps": 2},
            "num_sanity_val_steps must be 0, got 2: Sgfr cannot validate before it is fitted",
        ),
    ],
)
@pytest.mark.parametrize("update", [False, True])
def test_a_trainer_that_validates_before_all_images_were_seen_is_refused(
    arguments: dict[str, Any], message: str, update: bool, parts: Path, tmp_path: Path
) -> None:
    model = tiny(update=update)
    if update:
        model.update = False
        fit(model, folder_datamodule(parts), tmp_path)
        model.update = True
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        plain(tmp_path, max_epochs=1, **arguments).fit(model, datamodule=folder_datamodule(parts))
    if update:
        model.require_fitted("predict with")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    else:
        assert not model._is_fitted


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [
        ({"max_epochs": 1}, 1),
        ({"max_epochs": 5}, 1),
        ({}, 1),  # a thousand
        ({"max_epochs": 5, "val_check_interval": 3}, 1),  # all of them
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, 2),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2, "val_check_interval": 0.5}, 2),
        ({"max_epochs": 5, "check_val_every_n_epoch": None, "val_check_interval": 4}, 2),
        ({"max_epochs": 5, "limit_val_batches": 0, "val_check_interval": 0.5}, 1),
    ],
)
def test_one_pass_is_learnt_from_and_one_validation_waited_for(
    arguments: dict[str, Any],
    epochs: int,
    parts: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = []
    for trainer in (plain(tmp_path, max_epochs=1), plain(tmp_path, **arguments)):
        models.append(tiny())
        trainer.fit(models[-1], datamodule=folder_datamodule(parts))
    assert trainer.current_epoch == epochs
    assert torch.equal(*map(atoms, models))
    assert models[1].certificate().patches == models[0].certificate().patches
    if arguments.get("limit_val_batches") != 0:
        assert models[1].post_processor.image_threshold == models[0].post_processor.image_threshold
    assert "batches of training images" not in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [{"limit_train_batches": 2}, {"max_steps": 2}, {"max_epochs": 3, "limit_train_batches": 0.7}],
)
def test_images_that_a_trainer_leaves_out_are_told(
    arguments: dict[str, Any], parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "anomalib_sgfr"):
        plain(tmp_path, **{"max_epochs": 1, **arguments}).fit(
            tiny(), datamodule=folder_datamodule(parts)
        )
    told = [
        record.message
        for record in caplog.records
        if "batches of training images" in record.message
    ]
    assert [message[:59] for message in told] == [
        "The banks are made of 2 of 3 batches of training images: th"
    ]


def test_streams_and_several_loaders_have_no_number_of_batches() -> None:
    sampling = SubspaceSampling()
    sampling._batches = 2
    sampling._warn_if_partial(SimpleNamespace(train_dataloader=iter(()), is_global_zero=True))  # type: ignore[arg-type]
