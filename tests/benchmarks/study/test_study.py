"""A study's default is the product: the same figures as through anomalib's Engine."""

import json
from pathlib import Path

import pytest
import torch

from anomalib_sgfr.core.cover import centred
from anomalib_sgfr.core.sampling import SubspaceSampler
from anomalib_sgfr.core.selection import farthest_first
from benchmarks.common.features import load
from benchmarks.common.records import Spec, read
from benchmarks.common.zoo import resolve_arguments
from benchmarks.compare import run as benchmark_run
from benchmarks.study import command as study
from benchmarks.study.prototype import Nominal
from benchmarks.study.variants import DEFAULTS, STUDIES, Variant, spec_of


def test_the_default_variant_is_what_the_engine_gives(parts: Path, tmp_path: Path) -> None:
    # a bank of every patch does not depend on the order in which the images were seen
    changes = {"bank_size": 2000}
    variant = Variant("default", changes, image_size=64)
    spec = spec_of(variant, "folder", None, 0)
    (from_study,) = study._evaluate([spec], parts, tmp_path / "cache")

    arguments = resolve_arguments("sgfr", changes)
    engine_spec = Spec(**{**vars(spec), "arguments": arguments})
    benchmark_run.main(json.dumps({**vars(engine_spec), "root": str(parts)}), str(tmp_path))
    from_engine = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert from_study.bank_atoms == from_engine["bank_atoms"]
    assert from_study.metrics == pytest.approx(from_engine["metrics"], abs=2e-4)
    assert from_study.per_defect == pytest.approx(from_engine["per_defect"], abs=2e-4)


def test_embeddings_are_read_again_and_not_made_again(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("folder", parts, None, 0, None, "tf_efficientnet_lite0", (8, 16), (64, 64), tmp_path)
    first = load(*arguments)
    monkeypatch.setattr("benchmarks.common.features.PatchEmbedder.forward", None)
    second = load(*arguments)
    assert [maps.shape for maps in first.test] == [(12, 40, 8, 8), (12, 112, 4, 4)]
    assert all((one == other).all() for one, other in zip(first.test, second.test, strict=True))
    (joined,) = first.joined().test
    assert joined.shape == (12, 152, 8, 8)
    assert (joined[:, :40] == first.test[0]).all()
    assert first.regions is not None
    assert first.regions.shape == (12, 64, 64)
    assert sorted(set(first.kinds.tolist())) == ["abnormal", "good"]


def test_every_variant_is_told_apart_and_every_study_holds_the_default() -> None:
    for name, variants in STUDIES.items():
        keys = {spec_of(variant, "mtd", "tile", 0).key for variant in variants}
        assert len(keys) == len(variants), name
        default = spec_of(Variant("default"), "mtd", "tile", 0).key
        assert default in keys or name.startswith("few-shot"), name


def test_a_study_goes_on_where_it_stopped(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        STUDIES,
        "k",
        [Variant(str(k), {"num_atoms": k, "bank_size": 60}, image_size=64) for k in (1, 3)],
    )
    monkeypatch.setattr(study, "_places", lambda _: [("folder", None)])
    arguments = ["k", "--root", str(parts), "--seeds", "0", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert study.main(arguments) == 0
    table = (tmp_path / "k" / "README.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 3
    assert (tmp_path / "k" / "k.png").stat().st_size > 1000
    monkeypatch.setattr(study, "_evaluate", None)
    assert study.main(arguments) == 0
    capsys.readouterr()


def test_what_studies_share_runs_once_and_a_median_of_fewer_seeds_says_so(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"bank_size": 60}
    shared = Variant("5", small, image_size=64)
    monkeypatch.setitem(STUDIES, "k", [shared, Variant("1", {**small, "num_atoms": 1}, image_size=64)])
    monkeypatch.setitem(STUDIES, "blur", [shared, Variant("0", {**small, "blur": 0.0}, image_size=64)])
    monkeypatch.setattr(study, "_places", lambda _: [("folder", None)])
    where = ["--root", str(parts), "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert study.main(["k", "blur", *where, "--seeds", "0"]) == 0
    assert "3 of 3" in capsys.readouterr().out
    assert len(read(tmp_path / "k" / "results.json")) == len(read(tmp_path / "blur" / "results.json")) == 2
    assert "Seed 0, in percent; all else" in (tmp_path / "k" / "README.md").read_text(encoding="utf-8")

    monkeypatch.setitem(STUDIES, "k", [shared])
    assert study.main(["k", *where, "--seeds", "1"]) == 0
    monkeypatch.setitem(STUDIES, "k", [shared, Variant("1", {**small, "num_atoms": 1}, image_size=64)])
    study.report("k", tmp_path / "k")
    table = (tmp_path / "k" / "README.md").read_text(encoding="utf-8")
    assert "Medians of seeds 0, 1, in percent; (n): of n seeds" in table
    rows = [line.startswith("| 1 |") for line in table.splitlines() if " (1) " in line]
    assert rows == [True]
    capsys.readouterr()


@pytest.mark.parametrize("sampler", ["random", "stream", "whole", "residual", "pruned"])
def test_a_sampler_gives_the_same_bank_whatever_was_asked_before(sampler: str) -> None:
    patches = torch.randn(600, 12, generator=torch.Generator().manual_seed(0))
    after_others = Nominal(list(patches.split(100)), seed=0)
    for before in ("whole", "pruned"):
        after_others.bank({**DEFAULTS, "sampler": before, "bank_size": 40})
    arguments = {**DEFAULTS, "sampler": sampler, "bank_size": 100}
    bank = after_others.bank(arguments)
    alone = Nominal([patches], seed=0) if sampler != "stream" else Nominal(list(patches.split(100)), seed=0)
    assert bank.shape == (100, 12)
    assert torch.equal(bank, alone.bank(arguments))
    if sampler == "whole":
        assert torch.equal(bank, patches[farthest_first(patches, 100)[0]])


@pytest.mark.parametrize("size", [100, 4000])
def test_the_stream_of_a_study_is_the_product_s_sampler(size: int) -> None:
    patches = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0)).split(3000)  # thinned once on the way
    sampler = SubspaceSampler(size)
    for batch in patches:
        sampler.observe(batch)
    nominal = Nominal(list(patches), seed=0)
    nominal.bank({**DEFAULTS, "bank_size": 1000})
    assert torch.equal(nominal.bank({**DEFAULTS, "bank_size": size}), centred(sampler.cover()).atoms)
    assert torch.equal(nominal.bank({**DEFAULTS, "bank_size": size, "sampler": "unmoved"}), sampler.bank())


def test_a_plot_has_a_line_for_each_second_part_of_its_labels() -> None:
    pairs = ["100, k 1", "100, k 5", "250, k 1", "250, k 5"]
    assert study._lines(pairs) == {"k 1": {"100": 0, "250": 2}, "k 5": {"100": 1, "250": 3}}
    for labels in (["1", "2"], ["8, 16", "8"], pairs[:3]):
        assert study._lines(labels) == {"": {label: row for row, label in enumerate(labels)}}
