"""ELPV: the real package, and folders that are not it."""

from pathlib import Path

import pytest
from anomalib import TaskType

from anomalib_sgfr.data import ELPV, ELPVDataset

pytest.importorskip("elpv_dataset", reason="pip install elpv-dataset")


@pytest.mark.parametrize(
    ("cell_type", "normal", "defect"), [("mono", 588, 313), ("poly", 920, 402), ("both", 1508, 715)]
)
def test_counts_of_the_real_data(cell_type: str, normal: int, defect: int) -> None:
    train, test = (ELPVDataset(cell_type=cell_type, split=split) for split in ("train", "test"))
    assert len(train) + len(test) == normal + defect
    assert not train.has_anomalous
    assert int(test.samples.label_index.sum()) == defect
    assert len(test) - defect == round(0.2 * normal)
    assert train.task == TaskType.CLASSIFICATION


@pytest.mark.parametrize(
    ("threshold", "defects"), [(1.0, 313), (0.6, 369), (2 / 3, 369), (0.3, 486)]
)
def test_threshold_moves_the_defects_not_the_normal_cells(threshold: float, defects: int) -> None:
    samples = ELPVDataset(cell_type="mono", threshold=threshold).samples
    assert int(samples.label_index.sum()) == defects
    assert (samples[samples.label_index == 0].probability == 0).all()


def test_split_is_seeded_and_disjoint() -> None:
    def train(seed: int) -> set[str]:
        return set(ELPVDataset(split="train", split_seed=seed).samples.image_path)

    assert train(0) == train(0)
    assert train(0) != train(1)
    assert train(0).isdisjoint(ELPVDataset(split="test", split_seed=0).samples.image_path)


def test_datamodule_gives_images_and_names_its_results() -> None:
    datamodule = ELPV(cell_type="poly", num_workers=0, eval_batch_size=2)
    datamodule.setup()
    assert (datamodule.name, datamodule.category) == ("ELPV", "poly")
    batch = next(iter(datamodule.test_dataloader()))
    assert batch.image.shape == (2, 3, 300, 300)
    assert len(datamodule.val_data) == len(datamodule.test_data)


def test_a_folder_without_the_data_says_where_it_comes_from(tmp_path: Path) -> None:
    datamodule = ELPV(root=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"labels\.csv is missing.*pip install elpv-dataset"
    ):
        datamodule.setup()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_sgfr.data.elpv.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install elpv-dataset"):
        ELPVDataset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell_type": "amorphous"}, "cell_type must be one of mono, poly, both"),
        ({"threshold": 0.0}, "threshold must be"),
        ({"test_ratio": 1.0}, "test_ratio must lie"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELPVDataset(**arguments)  # type: ignore[arg-type]
