from anomalib_sgfr.report.callback import _with_kinds
from anomalib_sgfr.report.contents import ImageRow
from anomalib_sgfr.report.score_table import ScoreRow, each_once


def test_an_image_of_several_processes_counts_once() -> None:
    of_all = [
        [ImageRow(ScoreRow(path, score)) for path, score in rows]
        for rows in (
            [("c.png", 0.75), ("b.png", 0.5), ("", 0.1)],
            [("b.png", 0.5), ("a.png", 0.25), ("", 0.2)],
        )
    ]

    def path_of(image: ImageRow) -> str:
        return image.result.image

    paths = [path_of(image) for image in each_once(of_all, path_of)]
    assert paths == ["a.png", "b.png", "c.png", "", ""]
    assert each_once(of_all[:1], path_of) == of_all[0]


def test_the_kind_of_a_defect_is_its_folder_unless_that_holds_good_images_too() -> None:
    truths = {
        "t/good/1.png": 0,
        "t/hole/2.png": 1,
        "t/good/3.png": 1,
        "t/new/4.png": None,
        "t/own/5.png": 1,
    }
    images = [ImageRow(ScoreRow(path, 0.5, truth=truth)) for path, truth in truths.items()]
    kinds = [image.kind for image in _with_kinds(images, {"t/own/5.png": "scratch"})]
    assert kinds == ["good", "hole", "defect", "", "scratch"]
