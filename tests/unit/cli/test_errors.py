"""What others say of a mistake, in one line."""

from pathlib import Path

import pytest
from anomalib.data import PredictDataset
from anomalib.deploy import ExportType

from anomalib_sgfr.cli.errors import explain_error, in_one_line
from anomalib_sgfr.cli.main import _raised_in

NESTED = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'NoneType'>, <class 'anomalib.AnomalibModule'>]
  Errors:
    - Expected a <class 'NoneType'>
    - Problem with given class_path 'anomalib_sgfr.Sgfr':
        {}
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='it', val='x')"""
UNION = """Parser key "image_size":
          Does not validate against any of the Union subtypes
          Errors:
            - Expected a <class 'NoneType'>
            - Expected a <class 'int'>
            - Expected a tuple with 2 elements
          Given value type: <class 'list'>
          Given value: [1, 2, 3]"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            NESTED.format("Option 'blurr' is not accepted"),
            "there is no --model.blurr: did you mean blur?",
        ),
        (NESTED.format("Option 'zzz' is not accepted"), "there is no --model.zzz"),
        (
            NESTED.format(
                "Parser key \"trim\":\n          Expected a <class 'float'>. Got value: x"
            ),
            "--model.trim must be a number, got 'x'",
        ),
        (
            NESTED.format(
                "Parser key \"copies\":\n  Expected a typing.Literal['none', 'turned']. Got"
                " value: max"
            ),
            "--model.copies must be one of none, turned, got 'max'",
        ),
        (
            NESTED.format(UNION),
            "--model.image_size must be a whole number or a tuple with 2 elements, got '[1, 2, 3]'",
        ),
        (
            (
                "Parser key \"compression_type\":\n  Expected a member of <enum 'C'>: {FP16,INT8}\n"
                "  Given value: x"
            ),
            "--compression_type must be one of FP16, INT8, got 'x'",
        ),
        (
            "Option 'train.model' is required but not provided or its value is None.",
            "--model is missing",
        ),
        ("something\n  else  altogether", "something else altogether"),
        ('Parser key "config":\n  File does not exist', 'Parser key "config": File does not exist'),
    ],
)
def test_a_parsers_message(message: str, line: str) -> None:
    assert in_one_line(message) == line


def test_members_of_an_enumeration_are_listed() -> None:
    with pytest.raises(ValueError, match="tflite") as caught:
        ExportType("tflite")
    said = explain_error(caught.value, _raised_in(caught.value)[1])
    assert said == "'tflite' is not a valid ExportType: it must be one of onnx, openvino, torch"


def test_a_path_that_anomalib_does_not_take_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="non-printable") as caught:
        PredictDataset(tmp_path / "部品")
    said = explain_error(caught.value, None) or ""
    assert "paths of ASCII characters only" in said
    assert f"'{tmp_path}/部品' has others: rename or copy the folder" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            FileExistsError(17, "File exists", "a"),
            "'a' is a file, or lies under one: a folder is needed there",
        ),
        (IsADirectoryError(21, "Is a directory", "a"), "'a' is a folder: a file is needed there"),
        (
            RuntimeError("`test_dataloader` must be implemented"),
            "there are no images to test with: pass --data",
        ),
        (ValueError("'x' is not a valid y"), None),
        (FileNotFoundError(2, "No such file or directory", "a"), None),
    ],
)
def test_others_errors(error: Exception, words: str | None) -> None:
    assert explain_error(error, None) == words
