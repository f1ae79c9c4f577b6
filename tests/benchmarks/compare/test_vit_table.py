"""The comparison on a plain transformer, for who has weights of one: here one of random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.models import register_model
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer

from benchmarks.common.records import Spec
from benchmarks.common.zoo import resolve_arguments
from benchmarks.compare import run as benchmark_run

DRAWN = "vit_small_patch14_dino_drawn"


def vit_small_patch14_dino_drawn(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Of the depth of a ViT-S, and narrow; whatever is asked for, its weights are random."""
    del pretrained
    features = kwargs.pop("features_only", False)
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "exportable"):
        kwargs.pop(name, None)
    indices = kwargs.pop("out_indices", None)
    network = VisionTransformer(
        img_size=56, patch_size=14, embed_dim=32, depth=12, num_heads=2, **kwargs
    )
    if features:
        return FeatureGetterNet(network, out_indices=indices or tuple(range(12)))  # type: ignore[return-value]
    return network


@pytest.mark.parametrize("model", ["sgfr", "patchcore", "padim", "anomalydino"])
def test_a_transformers_table(model: str, parts: Path, tmp_path: Path) -> None:
    if not timm.is_model(DRAWN):
        register_model(vit_small_patch14_dino_drawn)
    arguments = {"sgfr": {"bank_size": 50}, "padim": {"n_features": 20}}.get(model, {})
    spec = Spec(
        dataset="folder",
        split=None,
        model=model,
        arguments=resolve_arguments(model, arguments),
        backbone=DRAWN,
        image_size=[56, 56],
        seed=0,
        limit_train=6,
    )
    benchmark_run.main(json.dumps({**vars(spec), "root": str(parts)}), str(tmp_path))
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["error"] is None
    assert 0 <= record["metrics"]["image_AUROC"] <= 1
    patches = 6 * 4 * 4
    assert (
        record["bank_atoms"]
        == {"sgfr": 100, "patchcore": 9, "padim": None, "anomalydino": patches}[model]
    )
