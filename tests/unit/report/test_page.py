"""What a page says, and what it must not let in."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomalib_sgfr.report.contents import ImageExplanation, ImageMedia
from anomalib_sgfr.report.media import BUDGET, outline, small_map, webp
from anomalib_sgfr.report.page import render, write_page
from anomalib_sgfr.report.statistics import Counts
from anomalib_sgfr.report.wording import printable, relative_names
from tests.example_report import HOSTILE, contents, drawn_scores, explanation, facts, stream


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_first_screen_says_what_numpy_counts() -> None:
    scores, truths = drawn_scores(300)
    page = render(contents(scores, truths))
    counts = Counts.at(0.5, scores, truths)
    words = " ".join(Elements(page).words)
    assert f"{counts.false_alarms} of {counts.good} good images are called anomalous" in words
    assert f"{counts.missed} of {counts.defective} defective images are missed" in words
    data = data_of(page)
    assert data["score"] == pytest.approx(scores, rel=1e-7)
    assert data["truth"] == truths
    assert data["kinds"] == ["good", "scratch"]


def test_rejected_defects_are_among_the_facts_of_the_model() -> None:
    rejected = ["2026-11-28T10:00:00+00:00 /parts/bad/a b.png", f"2026-11-29T10:00:00 {HOSTILE[0]}"]
    words = " ".join(Elements(render(contents([0.4], [1], model=facts(rejected=rejected)))).words)
    assert "Rejected defects" in words
    assert "1. a b.png (2026-11-28), 2. " in words
    assert "Rejected" not in render(contents([0.4], [1]))


def test_names_do_nothing_but_stand_there() -> None:
    plain = Elements(
        render(contents([0.4] * 7, [1] * 7, names=[f"{number}.png" for number in range(7)]))
    )
    hostile = contents(
        [0.4] * 7,
        [1] * 7,
        names=HOSTILE,
        kinds=HOSTILE,
        group="(.*)",
        basis=HOSTILE[0],
        notes=HOSTILE,
        model=facts(
            checkpoint=HOSTILE[0], arguments=[(HOSTILE[0], HOSTILE[1])], backbone=HOSTILE[1]
        ),
    )
    page = render(hostile)
    elements = Elements(page)
    allowed = {tag for tag, _ in plain.found}
    assert {tag for tag, _ in elements.found} <= allowed
    assert sum(tag == "script" for tag, _ in elements.found) == 2
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert not any(
        (value or "").startswith("javascript")
        for _, given in elements.found
        for value in given.values()
    )
    assert data_of(page)["path"][3].endswith("Бракованная 良品 عيب.png")
    page.encode("utf-8")  # no lone surrogate is left


def test_a_watched_stream_is_described() -> None:
    streams = [stream("cam2"), stream("cam1", changed_at=None, start=None, layers=[], maps=None)]
    page = render(contents([0.4, 0.6], [0, 1], streams=streams))
    words = " ".join(Elements(page).words)
    assert "scores are higher than those of the calibration images" in words
    assert "The alarm came after 50 of 60 images; the change began about image 21." in words
    assert "The residuals of layer2 (stride 16) have changed most: by -50%, 9.2 standard" in words
    assert "The anomaly map has changed most at the top right." in words
    adapted = "'/models/my model_adapted.ckpt'"
    commands = [re.sub("&#39;", "'", code) for code in re.findall(r"<code>(.*?)</code>", page)]
    assert "anomalib-sgfr adapt '/models/my model.ckpt' 'in/0 1.png' in/2.png" in commands
    assert f"anomalib-sgfr threshold {adapted} --held_out GOOD_FOLDER" in commands
    assert "Conditions have not changed in 60 images" in words
    assert words.count("What to do next") == 1
    assert 'href="#conditions"' in page
    without = render(contents([0.4, 0.6], [0, 1]))
    assert "conditions" not in without.partition("</style>")[2].lower()


def test_names_of_streams_do_nothing_but_stand_there() -> None:
    plain = Elements(render(contents([0.4], [1], streams=[stream("a")] * 7)))
    streams = [stream(name, new_images=HOSTILE) for name in HOSTILE]
    page = render(contents([0.4], [1], streams=streams, model=facts(checkpoint=HOSTILE[0])))
    assert [tag for tag, _ in Elements(page).found] == [tag for tag, _ in plain.found]
    page.encode("utf-8")


def test_only_the_pages_own_script_may_run_and_nothing_is_fetched() -> None:
    page = render(contents([0.4, 0.6], [0, 1]))
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    expected = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"script-src &#39;sha256-{expected}&#39;" in page
        or f"script-src 'sha256-{expected}'" in page
    )
    assert "default-src 'none'" in page
    for tag, attributes in Elements(page).found:
        for name in ("src", "href", "srcset", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/")), (tag, value)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page


NO_THRESHOLD = {"threshold": None, "normalised": False}
UNREADABLE = {"unreadable": [("/deep/a.png", "cut short")]}


@pytest.mark.parametrize(
    ("scores", "truths", "others", "expected"),
    [
        ([], [], {}, "No image was inspected."),
        ([0.7], [None], {}, "1 of 1 images is called anomalous"),
        ([0.4, 0.6], [0, 0], {}, "No defect was tested"),
        ([0.4, 0.6], [1, 1], {}, "No good image was tested"),
        ([3.0, 700.0], [0, 1], NO_THRESHOLD, "There is no threshold"),
        ([0.5, 0.5], [0, 1], {}, "0 of 1 good images are called anomalous"),
        ([0.4] * 9, [0] * 9, {"with_media": 3}, "The page leaves out 6 images"),
        ([0.4], [0], {"trained_on": 1, "chose": 1}, "All images tested chose the threshold or"),
        ([0.4], [0], {"trained_on": 1}, "1 of the 1 images tested was trained on, and is left out"),
        ([], [], {"unreadable": [("a", "cut")] * 3}, "None of 3 images could be read."),
        ([0.4], [0], UNREADABLE, "1 of 2 images could not be read"),
        ([0.4], [0], UNREADABLE, "cut short"),
        ([0.4], [0], {"warning": "1 good image: at 95%"}, "1 good image: at"),
        (
            [0.4],
            [0],
            {"model": facts(suspected=[], sha256="", checkpoint="")},
            "Folders and counts: not recorded",
        ),
        ([1.0, 3.4e38], [0, 1], {"normalised": False}, "1 good"),
    ],
)
def test_little_data_makes_a_page_that_says_so(
    scores: list[float], truths: list[int | None], others: dict[str, Any], expected: str
) -> None:
    page = render(contents(scores, truths, **others))
    assert expected in " ".join(Elements(page).words)
    assert data_of(page)["high"] > data_of(page)["low"]


def test_rates_are_of_new_images_and_a_second_line_has_all() -> None:
    scores, truths = drawn_scores(300)
    page = render(contents(scores, truths, trained_on=40, chose=90))
    words = " ".join(" ".join(Elements(page).words).split())
    new, every = (Counts.at(0.5, scores[first:], truths[first:]) for first in (90, 0))
    assert new != every
    for expected in (
        f"At the current threshold, {new.false_alarms} of {new.good} good images",
        f" and {new.missed} of {new.defective} defective images are missed.",
        "All images, including 90 that chose the threshold or were trained on: ",
        f" trained on: {every.false_alarms} of {every.good} good",
        f"{new.false_alarms} of {new.good}, 95% interval",
        f"{every.false_alarms} of {every.good}, 95% interval",
        "90 of the 300 images tested also chose the threshold, and are left out of the rates above",
        "40 of the 300 images tested were trained on, and are left out of the rates above",
    ):
        assert expected in words
    assert data_of(page)["known"] == [3] * 40 + [2] * 50 + [0] * 210


def test_the_command_says_which_images_the_threshold_was_read_from() -> None:
    plain = contents([0.4, 0.6], [0, 1], kinds=["a b", "c"])
    assert data_of(render(plain))["command"][1] == " --read_from '/parts/test/a b' /parts/test/c"
    many = contents([0.4] * 20, [0] * 20, kinds=[f"k{number}" for number in range(20)])
    assert data_of(render(many))["command"][1] == " --read_from /parts/test"


def test_a_group_has_a_line() -> None:
    scores, truths = drawn_scores(40)
    names = [f"camera{number % 3}_{number}.png" for number in range(40)]
    page = render(contents(scores, truths, names=names, group=r"camera(\d)"))
    data = data_of(page)
    assert data["groups"] == ["0", "1", "2"]
    assert data["group"] == [number % 3 for number in range(40)]


def test_places_common_to_all_are_told_once() -> None:
    assert relative_names(["/a/b/c/1.png", "/a/b/d/2.png"]) == ("/a/b", ["c/1.png", "d/2.png"])
    assert relative_names(["", "rel/1.png"]) == ("rel", ["image 1", "1.png"])
    assert relative_names([]) == ("", [])
    assert printable("a\x00\x1b[31m\u202e\udcff") == r"a\x00\x1b[31m\u202e\xff"


def test_a_page_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "report.html"
    write_page("one", file)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_page("two", file)
    assert file.read_text(encoding="utf-8") == "one"
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]


def test_a_page_of_500_images_of_noise_stays_below_10_megabytes() -> None:
    rng = np.random.default_rng(0)
    media = []
    for _ in range(4):
        values = rng.uniform(size=(256, 256))
        image = webp(rng.uniform(size=(256, 256, 3)).astype(np.float32), 256, BUDGET // 500)
        media.append(ImageMedia(image, small_map(values), outline(values, 0.5), "", 1.0))
    given = contents([0.6] * 500, [1] * 500, with_media=0)
    images = [part._replace(media=media[index % 4]) for index, part in enumerate(given.images)]
    explanations = dict.fromkeys(range(24), ImageExplanation(explanation().rows * 8))
    assert len(render(given._replace(images=images, explanations=explanations))) < 10_000_000
