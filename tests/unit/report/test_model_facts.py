import os
import shutil
from pathlib import Path

import pytest

from anomalib_sgfr.report.model_facts import known_images


def made(folder: Path, *names: str) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(f"{folder.name}/{name}".encode().ljust(64))
    return [str(folder / name) for name in names]


def test_one_file_by_other_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = known = made(tmp_path / "parts" / "good", "0.png", "1.png")
    (other,) = made(tmp_path / "parts" / "new", "2.png")
    (tmp_path / "linked").symlink_to(tmp_path / "parts", target_is_directory=True)
    os.link(one, tmp_path / "hard.png")
    monkeypatch.chdir(tmp_path / "parts")
    ways = [
        "good/0.png",
        "../parts/good/./0.png",
        "../linked/good/0.png",
        str(tmp_path / "hard.png"),
        one,
    ]
    assert known_images([*ways, other, "new/2.png", ""], known) == ([True] * 5 + [False] * 3, 0)
    assert known_images([one, other], ["good/0.png"]) == ([True, False], 0)
    assert known_images([], known) == ([], 0)
    assert known_images([one], []) == ([False], 0)


def test_a_copy_is_known_by_its_content(tmp_path: Path) -> None:
    known = made(tmp_path / "good", "0.png", "1.png")
    shutil.copy(known[1], tmp_path / "copy.png")
    assert known_images([str(tmp_path / "copy.png")], known) == ([True], 0)
    (tmp_path / "copy.png").write_bytes(b"x" * 64)
    assert known_images([str(tmp_path / "copy.png")], known) == ([False], 0)


def test_a_folder_that_was_moved_is_found_again(tmp_path: Path) -> None:
    root = tmp_path / "old" / "bottle"
    known = made(root / "train" / "good", *(f"{number}.png" for number in range(9)))
    made(root / "test" / "good", *(f"{number}.png" for number in range(4)))
    new = tmp_path / "elsewhere" / "bottle"
    new.parent.mkdir()
    root.replace(new)
    trained, tested = ([str(new / part / "good" / "0.png")] for part in ("train", "test"))
    assert known_images(trained + tested, known) == ([True, False], 1)
    shutil.rmtree(
        new / "train"
    )  # the names of the images tested are among those known, but not all are there
    assert known_images(tested, known) == ([False], 0)
    # another day's images of the same names
    (new / "test").replace(tmp_path / "another")
    again = [str(tmp_path / "another" / "good" / "0.png")]
    assert known_images(again, known[:4]) == ([False], 0)
    (tmp_path / "another").replace(tmp_path / "train")
    assert known_images([str(tmp_path / "train" / "good" / "0.png")], known[:4]) == ([True], 1)
