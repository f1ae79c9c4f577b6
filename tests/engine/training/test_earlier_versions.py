"""Checkpoints of version 0.1.0 still load, score and certify as they did.

Each of ``tests/data/version_0.1.0_*.ckpt`` was made by that version (commit 7cecc63) of four drawn
images of 64 x 64, 40 atoms a scale; the backbone's weights, which come with a package, are left out
of it and put back here. Under ``expected`` it has what that version scored two random images.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import PredictDataset

from anomalib_sgfr import Sgfr, SgfrPostProcessor
from anomalib_sgfr.features.embedding import PatchEmbedder
from tests.conftest import engine_in, fit, folder_datamodule, small

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(params=["affine", "ridge"])
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    state = torch.load(DATA / f"version_0.1.0_{request.param}.ckpt", weights_only=True)
    embedder = PatchEmbedder("tf_efficientnet_lite0", ["blocks.2", "blocks.4"])
    embedder.load_pretrained()
    state["state_dict"] |= {
        f"model.embedder.{name}": value for name, value in embedder.state_dict().items()
    }
    expected = state.pop("expected")
    torch.save(state, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt", expected


def test_it_scores_and_certifies_as_before(earlier: tuple[Path, dict[str, Any]]) -> None:
    path, expected = earlier
    model = Sgfr.load_from_checkpoint(path, map_location="cpu").eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model.model(images)
    torch.testing.assert_close(found.pred_score, expected["score"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.anomaly_map[:, 0, ::8, ::8], expected["map"], rtol=1e-4, atol=1e-4
    )
    certificate = model.certificate()
    assert certificate.patches == expected["patches"] == 4 * (8 * 8 + 4 * 4)
    # that version did not count what rounding adds
    for found_bound, then in (
        (certificate.largest, expected["largest"]),
        (certificate.mean, expected["mean"]),
    ):
        assert then * (1 - 1e-5) <= found_bound <= then * (1 + 1e-3)
    assert isinstance(model.post_processor, SgfrPostProcessor)
    assert model.post_processor.false_alarm_rate == 0.2
    assert float(model.post_processor.image_threshold) > 0


def test_its_origins_have_grids_now(earlier: tuple[Path, dict[str, Any]]) -> None:
    model = Sgfr.load_from_checkpoint(earlier[0], map_location="cpu").model
    assert {Path(path).parent.name for path in model.images} == {"good"}
    for bank, grid in zip(model.banks, (8, 4), strict=True):
        assert bank.origin.shape == (40, 5)
        assert bank.origin[:, 3:].unique(dim=0).tolist() == [[grid, grid]]
        assert int(bank.origin[:, 1:3].max()) < grid
        assert len(bank.thumbnails) in {0, 40}


def test_new_images_are_added_to_it(
    earlier: tuple[Path, dict[str, Any]], parts: Path, tmp_path: Path
) -> None:
    model = Sgfr.load_from_checkpoint(
        earlier[0], map_location="cpu", visualizer=False, evaluator=False
    )
    before = copy.deepcopy(model.model.fitted_state)
    model.update = True
    fit(model, folder_datamodule(parts), tmp_path / "update")
    assert model.certificate().patches == (4 + 12) * (8 * 8 + 4 * 4)
    thumbnails = [
        {
            tuple(atom): thumbnail
            for atom, thumbnail in zip(state.clusters.atoms.tolist(), state.thumbnails, strict=True)
        }
        for state in before.states
        if state.thumbnails is not None
    ]
    for bank, known in zip(model.model.banks, thumbnails, strict=False):  # none of ridge's
        stayed = [
            atom for atom in range(len(bank.atoms)) if tuple(bank.atoms[atom].tolist()) in known
        ]
        assert stayed
        for atom in stayed:
            assert torch.equal(bank.thumbnails[atom], known[tuple(bank.atoms[atom].tolist())])


def of_version_0_2(config: dict[str, Any]) -> None:
    """What a post-processor kept before its state was one object."""
    threshold = config.pop("threshold")
    config |= {
        name: threshold[name] for name in ("false_alarm_rate", "group", "value", "linear", "power")
    }
    config["evidence"] = {name: threshold["scores"][name] for name in ("scores", "kinds", "paths")}


@pytest.fixture
def of_shared_layers(parts: Path, tmp_path: Path) -> tuple[Path, Sgfr]:
    """Checkpoint of before map and score had layers of their own; a model of the same scores."""
    model = small(layers=["blocks.2", "blocks.4"], seed=0)
    path = Path(fit(model, folder_datamodule(parts), tmp_path / "fit").best_model_path)
    for bank in model.model.banks:
        bank.residual_scale.fill_(1.0)
    state = torch.load(path, weights_only=True)
    state["state_dict"] = {
        key: value for key, value in state["state_dict"].items() if not key.endswith(".nominal")
    }
    for arguments in (state["hyper_parameters"], state["sgfr_arguments"]):
        arguments.pop("score_layers")
    del state["sgfr_arguments"]["layers"]
    state["hyper_parameters"]["layers"] = None
    of_version_0_2(state["anomalib_post_processor_config"])
    torch.save(state, tmp_path / "earlier.ckpt")
    return tmp_path / "earlier.ckpt", model.eval()


def test_one_of_shared_layers_scores_as_it_did_and_is_kept_so(
    of_shared_layers: tuple[Path, Sgfr], parts: Path, tmp_path: Path
) -> None:
    path, expected = of_shared_layers
    images = torch.rand(2, 3, 128, 128)
    restored = Sgfr.load_from_checkpoint(path)
    calibration_scores = restored.post_processor.calibration_scores
    assert calibration_scores.peaks == calibration_scores.scores
    engine = engine_in(tmp_path)
    engine.predict(restored, dataset=PredictDataset(parts / "bad"))
    engine.trainer.save_checkpoint(tmp_path / "again.ckpt")
    by_trainer = small(image_size=None)
    engine_in(tmp_path).predict(by_trainer, dataset=PredictDataset(parts / "bad"), ckpt_path=path)
    for model in (restored, Sgfr.load_from_checkpoint(tmp_path / "again.ckpt"), by_trainer):
        with torch.no_grad():
            found, wanted = model.eval().model(images), expected.model(images)
        assert torch.equal(found.anomaly_map, wanted.anomaly_map)
        assert torch.equal(found.pred_score, wanted.anomaly_map.amax((1, 2, 3)))
        assert model.hparams["layers"] == model.hparams["score_layers"] == ["blocks.2", "blocks.4"]
        assert model.certificate().largest == expected.certificate().largest


def test_what_one_of_shared_layers_cannot_be_is_refused(
    of_shared_layers: tuple[Path, Sgfr], parts: Path, tmp_path: Path
) -> None:
    for arguments, message in (
        (
            {"layers": ["blocks.1", "blocks.2"]},
            r"banks are of 40 \+ 112 values a patch, the model's layers give 24 \+ 40: ",
        ),
        (
            {"layers": ["blocks.1", "blocks.2", "blocks.4"]},
            r"one bank for several layers of .*: load it with version 0.2.0, or fit again",
        ),
        (
            {"score_layers": ["blocks.6"]},
            r"with score_layers \['blocks.2', 'blocks.4'\], .*pass --model.score_layers",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Sgfr.load_from_checkpoint(of_shared_layers[0], **arguments)
    with pytest.raises(
        ValueError, match=r"with layers .*pass --model.layers \"\[blocks.2, blocks.4\]\""
    ):
        engine_in(tmp_path).predict(
            small(layers=["blocks.1"], image_size=None),
            dataset=PredictDataset(parts / "bad"),
            ckpt_path=of_shared_layers[0],
        )


def test_one_of_before_weights_scores_as_it_did_and_is_kept_so(parts: Path, tmp_path: Path) -> None:
    """Without layers of stride 4 in the score, and all others of weight 1."""
    before = ["blocks.2", "blocks.4", "blocks.5"]
    module = folder_datamodule(parts)
    expected = small(score_layers=before, seed=0, image_size=64)
    state = torch.load(fit(expected, module, tmp_path / "fit").best_model_path, weights_only=True)
    assert state["sgfr_arguments"]["score_layers"] == before
    state["hyper_parameters"]["score_layers"] = None
    torch.save(state, path := tmp_path / "earlier.ckpt")
    images = torch.rand(2, 3, 64, 64)
    restored = Sgfr.load_from_checkpoint(path)
    by_trainer = small(image_size=None)
    engine = engine_in(tmp_path)
    engine.predict(by_trainer, dataset=PredictDataset(parts / "bad"), ckpt_path=path)
    engine.trainer.save_checkpoint(tmp_path / "again.ckpt")
    again = Sgfr.load_from_checkpoint(tmp_path / "again.ckpt")
    threshold = float(expected.post_processor.image_threshold)
    for model in (restored, by_trainer, again):
        found, wanted = model.eval()(images), expected.eval()(images)
        assert torch.equal(found.pred_score, wanted.pred_score)
        assert torch.equal(found.anomaly_map, wanted.anomaly_map)
        assert float(model.post_processor.image_threshold) == threshold
        assert model.hparams["score_layers"] == before
        assert model.certificate().largest_score == expected.certificate().largest_score
    weights = {"blocks.1": 0.25, **dict.fromkeys(before[1:], 1.0)}
    asked = Sgfr.load_from_checkpoint(path, score_layers=weights)
    assert [scale.score_weight for scale in asked.model.embedder.scales] == [0.25, 0.0, 1.0, 1.0]
    assert not asked.post_processor.is_set  # its scores were others


def test_weights_of_layers_are_kept(parts: Path, tmp_path: Path) -> None:
    weights = {"blocks.4": 0.5, "blocks.1": 0.25}
    model = small(score_layers=weights, seed=0, image_size=64)
    path = fit(model, folder_datamodule(parts), tmp_path / "fit").best_model_path
    images = torch.rand(2, 3, 64, 64)
    restored = Sgfr.load_from_checkpoint(path)
    assert torch.equal(restored.eval()(images).pred_score, model.eval()(images).pred_score)
    message = (
        r"with score_layers .*: pass --model.score_layers \"\{blocks.1: 0.25, blocks.4: 0.5\}\""
    )
    with pytest.raises(ValueError, match=message):
        engine_in(tmp_path).predict(
            small(image_size=None), dataset=PredictDataset(parts / "bad"), ckpt_path=path
        )


@pytest.mark.parametrize("kept", ["hyper_parameters", "sgfr_arguments"])
def test_removed_arguments_are_read_at_their_only_value_and_refused_at_another(
    of_shared_layers: tuple[Path, Sgfr], tmp_path: Path, kept: str
) -> None:
    state = torch.load(of_shared_layers[0], weights_only=True)
    path = tmp_path / "removed.ckpt"
    state[kept] |= {"pooling": "binomial", "bank_per": "layer"}
    torch.save(state, path)
    assert not {"pooling", "bank_per"} & set(Sgfr.load_from_checkpoint(path).hparams)
    for argument, value, remedy in (
        ("pooling", "box", "load it with version 0.2.0, or fit again"),
        ("bank_per", "stride", "fit again, as no release reads it"),
    ):
        torch.save({**state, kept: {**state[kept], argument: value}}, path)
        with pytest.raises(ValueError, match=f"{argument} '{value}', .*: {remedy}"):
            Sgfr.load_from_checkpoint(path)


@pytest.fixture
def changed_by_0_2(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Checkpoint that version 0.2.0 changed by ``anomalib-sgfr threshold --false_alarm_rate 0.2``.

    It is of commit 9232add. Its callbacks still have the threshold of before, and its flags no
    metrics. Its images are gone.
    """
    state = torch.load(DATA / "version_0.2.0_threshold.ckpt", weights_only=True)
    embedder = PatchEmbedder(
        "tf_efficientnet_lite0", ["blocks.0", "blocks.1"], score_layers=["blocks.1"]
    )
    embedder.load_pretrained()
    state["state_dict"] |= {
        f"model.embedder.{name}": value for name, value in embedder.state_dict().items()
    }
    expected = state.pop("expected")
    torch.save(state, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt", expected


def test_a_threshold_changed_by_version_0_2_counts_in_every_tool(
    changed_by_0_2: tuple[Path, dict[str, Any]], parts: Path, tmp_path: Path
) -> None:
    path, expected = changed_by_0_2
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    restored = Sgfr.load_from_checkpoint(path, map_location="cpu")
    layers = {
        "layers": ["blocks.0", "blocks.1"],
        "score_layers": ["blocks.1"],
        "image_size": 64,
        "bank_size": 100,
    }
    by_engine = Sgfr(**layers, visualizer=False)
    engine = engine_in(tmp_path)
    (figures,) = engine.test(by_engine, datamodule=folder_datamodule(parts), ckpt_path=path)
    assert "image_F1Score" in figures
    for model in (restored, by_engine):
        found = model(images)
        torch.testing.assert_close(found.pred_score, expected["score"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.anomaly_map[:, 0, ::8, ::8], expected["map"], rtol=1e-4, atol=1e-4
        )
        assert found.pred_label.tolist() == expected["label"].tolist()
        state = model.post_processor.state
        assert (
            state.by,
            state.rate,
            len(state.scores.good.scores),
            len(state.scores.defective.scores),
        ) == (
            "good",
            0.2,
            6,
            6,
        )
        assert (
            state.image == float(model.post_processor.image_threshold) == pytest.approx(1.6905471)
        )
