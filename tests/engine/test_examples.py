"""The examples in the docstrings of the public names, run on a small fitted model."""

import doctest
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder

import anomalib_sgfr
from anomalib_sgfr import Sgfr
from tests.conftest import engine_in

NAMES = [name for name in anomalib_sgfr.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_in_the_docstring_runs(
    name: str,
    checkpoint: Path,
    parts: Path,
    datamodule: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = {
        "model": Sgfr.load_from_checkpoint(checkpoint),
        "checkpoint": checkpoint,
        "datamodule": datamodule,
        "parts": parts,
        "image": parts / "bad" / "00.png",
        "folder": tmp_path,
        "engine": engine_in(tmp_path),
        "torch": torch,
    }
    docstring = getattr(anomalib_sgfr, name).__doc__
    example = doctest.DocTestParser().get_doctest(docstring, namespace, name, None, None)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not failed.failed, "".join(said)
