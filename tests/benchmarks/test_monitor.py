"""The monitor's measurement: streams of good images, and of changed conditions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import monitor
from tests.conftest import write_image


@pytest.mark.usefixtures("small_images")
def test_measures_a_folder_of_ones_own(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "parts"
    for number in range(24):
        write_image(root / "good" / f"{number:02}.png", number)
    for number in range(44):
        write_image(root / "good_test" / f"{number:02}.png", 100 + number)
    (root / "bad").symlink_to(parts / "bad")
    for name, value in (
        ("NEW_IMAGES", 3),
        ("_TESTED", 4),
        ("_ORDERS", 5),
        ("_STREAMS", 3),
        ("_AFTER", 120),
    ):
        monkeypatch.setattr(monitor, name, value)
    monkeypatch.setattr(monitor, "_CONDITIONS", {"blur": monitor._blur})
    out = tmp_path / "out"
    arguments = ["--root", str(root), "--data", "folder", "--seeds", "0", "--out", str(out)]
    assert monitor.main(arguments) == 0
    rows = json.loads((out / "monitor.json").read_text(encoding="utf-8"))
    assert {(row["calibration"], row["condition"], row["way"]) for row in rows} == {
        ("training", "none", ""),
        ("held out", "none", ""),
        ("training", "blur", "step"),
        ("training", "blur", "ramp"),
        ("training", "none", "labels"),
        ("training", "blur", "labels"),
    }
    labels = [row for row in rows if row["way"] == "labels"]
    assert [row["rule"] for row in labels] == list(monitor._LABELS)
    assert all(0.0 <= row[name] <= 1.0 for row in labels for name in ("false_alarms", "missed"))
    for row in rows:
        if row["rule"] == "monitor" and row["calibration"] == "held out":
            assert row["found"] == 0.0
    page = (out / "README.md").read_text(encoding="utf-8")
    assert "| folder | blur | step |" in page
    (line,) = (
        line
        for line in page.splitlines()
        if line.startswith("| folder | blur | ") and "ramp" not in line and "step" not in line
    )
    first = labels[0]
    cell = f"{100 * first['false_alarms']:.0f} / {100 * first['missed']:.0f}"
    assert line.split(" | ")[2] == cell


def test_labels_are_counted_at_the_threshold() -> None:
    good, bad = np.array([1.0, 2.0, 3.0, 4.0]), np.array([3.0, 5.0])
    row = monitor._label_row("changed", good, bad, 3.0)
    assert (row["false_alarms"], row["missed"]) == (0.25, 0.5)


def test_both_rules_find_a_step_and_neither_an_even_stream() -> None:
    rng = np.random.default_rng(0)
    calibration, even = rng.normal(size=300), rng.normal(size=200)
    step = np.concatenate([even[:100], even[100:] + 2.0])
    for find in (monitor._monitor_alarm, monitor._thumb_alarm):
        assert find(calibration, even) is None
        at = find(calibration, step)
        assert at is not None
        assert 100 < at < 160
    rows = monitor._rows(calibration, [step, even], 100, {"condition": "x"})
    assert [(row["early"], row["found"]) for row in rows] == [(0.0, 0.5)] * 2


@pytest.mark.parametrize("name", monitor._CONDITIONS)
def test_a_condition_of_strength_zero_is_none_and_grows(name: str) -> None:
    noise = torch.rand(3, 256, 192, generator=torch.Generator().manual_seed(0))
    image = 0.1 * noise + 0.8 * torch.linspace(0, 1, 192).expand(3, 256, 192)
    change = monitor._CONDITIONS[name]
    if "JPEG" not in name and "blur" not in name:
        torch.testing.assert_close(change(image, 0.0), image)
    weak, strong = ((change(image, size) - image).abs().mean() for size in (1 / 3, 1.0))
    assert 0.0 < weak < strong
    assert change(image, 1.0).shape == image.shape
