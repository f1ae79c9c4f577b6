"""Commands of the how-to pages, one page after the other, by ``tests/warm.py``."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from tests.conftest import write_image

ROOT = Path(__file__).parents[2]
PAGES = ("train", "thresholds", "deploy")
SECTIONS = {
    part.splitlines()[0]: re.findall(r"^```(sh|python)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    for page in PAGES
    for part in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").split("\n## ")[1:]
    if "\n```" in part
}
LEAVES = {
    "Check the machine": "machine.json",
    "Own folder": "results/Sgfr/parts/latest/images/**/*.png",
    "Predict": "found/arrays/**/*.npz",
    "Few images": "results/Sgfr/few/latest/**/model.ckpt",
    "Noisy labels": "results/Sgfr/trimmed/latest/suspects.csv",
    "Large images by tiles": "results/Sgfr/tiled/latest/**/*.png",
    "High bit depth": "results/Sgfr/deep/latest/**/model.ckpt",
    "Region of interest": "results/Sgfr/masked/latest/**/model.ckpt",
    "Several GPUs or processes": "results/Sgfr/two/latest/**/model.ckpt",
    "Several machines": "results/Sgfr/nodes/*/**/model.ckpt",
    "New good parts later": "results/Sgfr/updated/latest/**/model.ckpt",
    "Compare with Patchcore": "runs/parts/README.md",
    "Offline weights in another model": "results/Patchcore/weights/latest/**/model.ckpt",
    "Threshold without defects": "results/Sgfr/calibrated/latest/**/model.ckpt",
    "Change the threshold later": "where_results_show_0.6.ckpt",
    "Learn from false alarms": "*.ckpt",
    "Learn from missed defects": "untaught.ckpt",
    "Domain shift": "adapted_threshold.ckpt",
    "Notice changed conditions": "line.html",
    "Explain": "figures/**/*.png",
    "Report": "report.html",
    "What would be missed": "sensitivity.html",
    "OpenVINO and ONNX Runtime": "heatmaps/**/*.png",
    "Inspector and camera loop": "last_defect.png",
    "Several products on one line": "exported/**/model.xml",
}


def run(kind: str, code: str, folder: Path, warm: Path) -> None:
    search = os.pathsep.join([str(warm), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-euc", code] if kind == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("howto")
    for index in range(8):
        write_image(folder / "parts" / "good" / f"{index:02}.png", index)
    for index in range(2):
        write_image(folder / "parts" / "bad" / f"{index:02}.png", 200 + index, defect=True)
    for index in range(4):
        write_image(folder / "parts" / "more" / f"{index:02}.png", 300 + index)
    shutil.copytree(ROOT / "examples", folder / "examples")
    film = cv2.VideoWriter(str(folder / "frames.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (96, 96))
    for path in sorted((folder / "parts").glob("[gb]*d/*.png")):
        film.write(cv2.imread(str(path)))
    film.release()
    first = "Own folder"
    for kind, code in SECTIONS[first]:
        run(kind, code, folder, warm)
    return folder


@pytest.mark.parametrize("section", SECTIONS)
def test_the_commands_of(section: str, workplace: Path, warm: Path) -> None:
    if section != "Own folder":
        for kind, code in SECTIONS[section]:
            run(kind, code, workplace, warm)
    assert list(workplace.glob(LEAVES[section]))


def test_every_section_has_commands() -> None:
    assert set(SECTIONS) == set(LEAVES)
    assert all(SECTIONS.values())
