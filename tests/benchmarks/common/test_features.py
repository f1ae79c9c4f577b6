"""Embeddings of a data set, kept on disk."""

from pathlib import Path

import pytest

from benchmarks.common.features import load


def test_embeddings_are_read_again_and_not_made_again(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (
        "folder",
        parts,
        None,
        0,
        None,
        "tf_efficientnet_lite0",
        (8, 16),
        (64, 64),
        tmp_path,
    )
    first = load(*arguments)
    monkeypatch.setattr("benchmarks.common.features.PatchEmbedder.forward", None)
    second = load(*arguments)
    assert [maps.shape for maps in first.test] == [(12, 40, 8, 8), (12, 112, 4, 4)]
    assert all((one == other).all() for one, other in zip(first.test, second.test, strict=True))
    assert first.regions is not None
    assert first.regions.shape == (12, 64, 64)
    assert sorted(set(first.kinds.tolist())) == ["abnormal", "good"]
