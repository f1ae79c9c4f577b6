from anomalib_sgfr.report.callback import _each_once, _with_kinds
from anomalib_sgfr.report.contents import Unit
from anomalib_sgfr.report.score_table import Scored


def test_several_processes_tell_of_each_image_once() -> None:
    first = [Unit(Scored("c.png", 0.75)), Unit(Scored("b.png", 0.5)), Unit(Scored("", 0.1))]
    second = [Unit(Scored("b.png", 0.5)), Unit(Scored("a.png", 0.25)), Unit(Scored("", 0.2))]
    found = _each_once([first, second])
    assert [unit.scored.image for unit in found] == ["a.png", "b.png", "c.png", "", ""]
    assert _each_once([first]) == first


def test_a_kind_is_the_folder_of_a_defect_unless_good_ones_lie_there_too() -> None:
    truths = {
        "t/good/1.png": 0,
        "t/hole/2.png": 1,
        "t/good/3.png": 1,
        "t/new/4.png": None,
        "t/own/5.png": 1,
    }
    units = [Unit(Scored(path, 0.5, truth=truth)) for path, truth in truths.items()]
    kinds = [unit.kind for unit in _with_kinds(units, {"t/own/5.png": "scratch"})]
    assert kinds == ["good", "hole", "defect", "", "scratch"]
