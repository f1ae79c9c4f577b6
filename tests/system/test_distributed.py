"""Two and three real processes under Lightning's own data-parallel strategy, against one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from PIL import Image
from torch.utils.data import DistributedSampler

from anomalib_sgfr import Sgfr
from anomalib_sgfr.training.distributed import is_padding
from tests.conftest import folder_datamodule
from tests.system.three_processes import TASKS
from tests.system.uniting import GRID, patches

ROOT = Path(__file__).parents[2]


def run(parts: Path, out: Path, devices: int, warm: Path) -> list[dict[str, Any]]:
    out.mkdir()
    script = Path(__file__).with_name("two_processes.py")
    # the second process is started as the first was: by an interpreter
    python = warm / "script" if devices == 1 else sys.executable
    finished = subprocess.run(
        [python, script, parts, out, str(devices)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [torch.load(path, weights_only=True) for path in sorted(out.glob("rank*.pt"))]


@pytest.fixture(scope="module")
def odd(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven parts to fit and to test: one of two processes gets one of them twice, to have as many
    as the other.
    """
    root = tmp_path_factory.mktemp("odd") / "parts"
    shutil.copytree(parts, root)
    (root / "good" / "11.png").unlink()
    (root / "good_test" / "05.png").unlink()
    region = Image.new("L", (96, 96))
    region.paste(255, (0, 0, 72, 96))  # three quarters of the columns
    region.save(root / "roi.png")
    return root


@pytest.fixture(scope="module")
def both(
    odd: Path, warm: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    (one,) = run(odd, folder / "one", 1, warm)
    return one, run(odd, folder / "two", 2, warm)


def test_every_process_ends_with_the_same_bank(
    both: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    one, two = both
    assert len(two) == 2
    sizes = (120, 120, 120, 11 * 4)  # of the last there are no more patches
    for mine, theirs, alone, size in zip(
        two[0]["banks"], two[1]["banks"], one["banks"], sizes, strict=True
    ):
        assert torch.equal(mine, theirs)
        assert len(mine) == len(alone) == size
        assert not torch.equal(mine, alone)  # it did see the images in another order
    assert (
        two[0]["patches"] == two[1]["patches"] == one["patches"] == 11 * (2 * 8 * 6 + 4 * 3 + 2 * 2)
    )
    assert two[0]["nominal"] == two[1]["nominal"]
    assert two[0]["image_AUROC"] == two[1]["image_AUROC"]
    assert two[0]["threshold"] == two[1]["threshold"]
    assert (
        two[0]["scored"] == two[1]["scored"] == 11 + 11
    )  # of training and of validation, each once
    assert two[0]["defects"] == two[1]["defects"] == one["defects"] == 6


def test_the_certificate_holds_and_the_bank_is_as_good(
    both: tuple[dict[str, Any], list[dict[str, Any]]], odd: Path, tmp_path: Path
) -> None:
    one, (two, _) = both
    datamodule = folder_datamodule(odd)
    datamodule.setup()
    worst = {}
    for name, ended in (("one", one), ("two", two)):
        model = Sgfr.load_from_checkpoint(ended["checkpoint"], visualizer=False)
        assert all(map(torch.equal, (bank.atoms for bank in model.model.banks), ended["banks"]))
        engine = Engine(accelerator="cpu", default_root_dir=tmp_path, logger=False)
        batches = engine.predict(model, dataset=datamodule.train_data, return_predictions=True)
        assert batches
        with torch.no_grad():
            images = torch.cat([batch.image for batch in batches])
            lengths = model.model.score_maps(images).residuals
        inside = model.model.patches_inside([length.shape[2:] for length in lengths])
        assert inside is not None
        # of the scales that contribute to the map
        lengths = [length[..., mask] for length, mask in zip(lengths, inside, strict=True)][:3]
        worst[name] = sum(float(length.max()) for length in lengths)
        assert worst[name] <= ended["largest"]
        assert sum(float(length.mean()) for length in lengths) <= ended["mean"]
    assert worst["two"] < 1.5 * worst["one"]
    # chosen once from all that both hold, not from what would be left of each: the bounds do not
    # add up
    assert two["largest"] < 1.1 * one["largest"]
    assert two["mean"] < 1.1 * one["mean"]


def test_a_checkpoint_of_two_processes_is_an_ordinary_one(
    both: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    one, (two, _) = both
    keys = [
        set(torch.load(ended["checkpoint"], weights_only=True)["state_dict"])
        for ended in (one, two)
    ]
    assert keys[0] == keys[1]


@pytest.fixture(scope="module")
def united(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What a fit and an update leave in each of two processes."""
    out = tmp_path_factory.mktemp("uniting")
    script = Path(__file__).with_name("uniting.py")
    processes = [
        subprocess.Popen(
            [warm / "script", script, out, str(rank), "2"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("stage", "images"), [(0, 6), (1, 8)])
def test_united_atoms_know_where_they_were_seen(
    united: list[list[dict[str, Any]]], stage: int, images: int
) -> None:
    mine, theirs = (process[stage] for process in united)
    assert mine["images"] == theirs["images"]
    assert sorted(mine["images"]) == [f"image {image}" for image in range(images)]
    for scale, (clusters, other) in enumerate(zip(mine["covers"], theirs["covers"], strict=True)):
        assert all(
            torch.equal(part, other[name]) or name == "offset" for name, part in clusters.items()
        )
        assert 7 < len(clusters["atoms"]) <= 60
        assert int(clusters["count"].sum()) == images * 28, (
            "each patch counts once among all processes"
        )
        for origin, atom, radius in zip(
            clusters["origin"].tolist(), clusters["atoms"], clusters["radius"], strict=True
        ):
            image = int(mine["images"][origin[0]].removeprefix("image "))
            assert origin[3:] == list(GRID)
            where = patches(image, scale)[origin[1] * GRID[1] + origin[2]]
            assert float((where - atom).norm()) <= float(radius) + 1e-2  # but for 16 bits


def test_united_bounds_hold_for_all_that_any_process_saw(
    united: list[list[dict[str, Any]]],
) -> None:
    """Thresholds are the largest of all processes' and of uniting; an update's are no smaller."""
    for scale in range(2):
        every = torch.cat([patches(image, scale) for image in range(8)])
        first, second = (united[0][stage]["covers"][scale] for stage in (0, 1))
        for clusters, seen in ((first, every[: 6 * 28]), (second, every)):
            nearest = torch.cdist(seen.double(), clusters["atoms"].double()).amin(1)
            assert float(nearest.max()) <= float(clusters["radius"].max()) * (1 + 1e-3)
            assert float(nearest.square().sum()) <= float(clusters["squares"].sum()) * (1 + 1e-3)
        assert (
            2.0 <= united[0][0]["thresholds"][scale] <= united[0][1]["thresholds"][scale]
        )  # half of the tolerance


def test_united_atoms_within_the_tolerance_stand_for_each_other(
    united: list[list[dict[str, Any]]],
) -> None:
    """The threshold is the largest that any process came to, also where uniting drops no atom."""
    for apart, within in (process[2:] for process in united):
        assert sorted(apart["covers"][0]["atoms"].tolist()) == [
            [0.0, 0.0],
            [0.0, 0.5],
            [9.0, 0.0],
            [9.0, 0.5],
        ]
        assert apart["covers"][0]["count"].tolist() == [1] * 4
        assert sorted(within["covers"][0]["atoms"].tolist()) == [[0.0, 0.25], [9.0, 0.25]]
        assert within["covers"][0]["count"].tolist() == [2, 2]
        assert (apart["thresholds"], within["thresholds"]) == ([3.0], [1.0])


@pytest.mark.parametrize("images", [1, 5, 11, 12])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_images_that_only_fill_up_are_told_apart(images: int, batch: int) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(images))
    seen: list[int] = []
    for rank in range(3):
        sampler = DistributedSampler(data, 3, rank, shuffle=True)
        loader = torch.utils.data.DataLoader(data, batch, sampler=sampler)
        for number, (items,) in enumerate(loader):
            seen += items[~is_padding(loader, number, len(items))].tolist()
    assert sorted(seen) == list(range(images))
    plain = torch.utils.data.DataLoader(data, batch)
    assert not is_padding(plain, 0, batch).any()


@pytest.fixture(scope="module")
def few(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What three processes, and one alone, end every task with."""
    out = tmp_path_factory.mktemp("few")
    script = Path(__file__).with_name("three_processes.py")
    with (out / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, script, parts, out],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(300)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, (out / "log").read_text()[-10_000:]
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "images"), TASKS)
def test_few_images_on_three_processes_come_to_what_they_do_on_one(
    few: dict[str, dict[str, Any]], task: str, images: int
) -> None:
    ended = {name: tasks[f"{task} {images}"] for name, tasks in few.items()}
    assert len(ended) == 4
    alone, first, *others = (ended[name] for name in ("alone", "rank0", "rank1", "rank2"))
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        if name in {"error", "table"} or not value:
            assert first[name] == value if name != "table" else _rows(first[name]) == _rows(value)
        else:
            assert first[name] == _nearly(value)
    if task != "predict":  # one process writes the table
        assert first == others[0] == others[1]
    assert ("error" in alone) == (task == "fit_with_damaged")


def _rows(table: list[list[str]]) -> list[list[str]]:
    """Lines of a table of scores, these rounded."""
    return [[image, f"{float(score):.4f}", *rest] for image, score, *rest in table[1:]]


def _nearly(value: Any) -> Any:
    """Equal but for rounding, within lists and mappings."""
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-3)
    if isinstance(value, list):
        return [_nearly(part) for part in value]
    return (
        {name: _nearly(part) for name, part in value.items()} if isinstance(value, dict) else value
    )
