"""Ready for what anomalib may become, and for who drives it: other forms of its registry, Studio's
sequence.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.data.utils import ValSplitMode
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator, F1Score
from anomalib.models import get_model, list_models
from anomalib.models.components import AnomalibModule
from lightning.pytorch.callbacks import EarlyStopping

from anomalib_sgfr import Sgfr
from tests.system.test_plugin import FIRST as IMPORTS
from tests.system.test_plugin import needs_forks, python

ROOT = Path(__file__).parents[2]
SMALL = {  # without weights to load
    "backbone": "test_resnet",
    "layers": ["layer1"],
    "score_layers": ["layer1"],
    "pre_trained": False,
}
# anomalib.models as it is, changed once it has been executed: what the next version may do
_CHANGING = """
import sys
from importlib.machinery import PathFinder
class Changing:
    def find_spec(self, name, path=None, target=None):
        if name != "anomalib.models":
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def changed(m):
            execute(m)
            CHANGE
        spec.loader.exec_module = changed
        return spec
sys.meta_path.insert(0, Changing())
import anomalib_sgfr
FIRST
import anomalib.models as m
from anomalib_sgfr import Sgfr
assert (getattr(m, "Sgfr", None) is Sgfr) is REGISTERED
asked = {"class_path": "anomalib_sgfr.Sgfr", "init_args": SMALL}
assert not ASKED or type(m.get_model(asked)) is Sgfr
assert "sgfr" in m.list_models()
from anomalib.cli import AnomalibCLI
sys.argv = ["anomalib"]
small = [f"--model.{name}={value}" for name, value in SMALL.items()]
AnomalibCLI(["train", "--model", "anomalib_sgfr.Sgfr", "--model.bank_size", "7", *small], run=False)
"""
CHANGES = {
    "frozen": (
        "m.ALLOWED_MODULES, m.__all__ = frozenset(m.ALLOWED_MODULES), tuple(m.__all__)",
        True,
        0,
    ),
    "without a list of modules": ("del m.ALLOWED_MODULES", False, 1),
    "without a list of names": ("del m.__all__", True, 1),
    "lazy": (
        (
            "last = m.get_model; del m.get_model; m.__getattr__ = lambda name: {'get_model':"
            " last}[name]"
        ),
        True,
        0,
    ),
    "moved": ("del m.get_model", False, 0),
    "locked": (
        (
            "m.__class__ = type('Locked', (type(m),), {'__setattr__': lambda *_: (_ for _ in"
            " ()).throw(TypeError('no'))})"
        ),
        False,
        1,
    ),
}


FIRST = ["", "import anomalib_sgfr.lightning_model"]


def statement(how: str, first: str) -> str:
    change, asked, _ = CHANGES[how]
    values = {
        "CHANGE": change,
        "FIRST": first,
        "REGISTERED": str(how != "locked"),
        "ASKED": str(asked),
        "SMALL": repr(SMALL),
    }
    return re.sub("|".join(values), lambda found: values[found[0]], _CHANGING)


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each of the statements said when nothing of anomalib was imported before."""
    statements = json.dumps([statement(how, first) for how in CHANGES for first in FIRST])
    done = python(
        f"import runpy, sys; sys.argv = ['', {statements!r}]; runpy.run_path({IMPORTS!r}, None,"
        " '__main__')"
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@needs_forks
@pytest.mark.parametrize("first", FIRST, ids=["anomalib first", "Sgfr first"])
@pytest.mark.parametrize("how", CHANGES)
def test_another_registry_costs_a_warning_at_most(
    how: str, first: str, said: dict[str, str]
) -> None:
    found = said[statement(how, first)]
    assert "Traceback" not in found, found
    assert found.count("anomalib_sgfr could not register") == CHANGES[how][2], found


def test_it_is_a_direct_subclass_which_alone_are_listed() -> None:
    assert Sgfr in AnomalibModule.__subclasses__()
    assert "sgfr" in list_models()
    assert "Sgfr" in list_models(case="pascal")


def test_the_sequence_of_studio(parts: Path, tmp_path: Path) -> None:
    assert "sgfr" in list_models()
    fields = ["anomaly_map", "gt_mask"]
    evaluator = Evaluator(
        val_metrics=[
            AUROC(["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields, prefix="pixel_", strict=False),
        ],
        test_metrics=[F1Score(["pred_label", "gt_label"], prefix="image_")],
    )
    small = {
        "backbone": "test_resnet",
        "layers": ["layer1"],
        "pre_trained": False,
        "bank_size": 50,
        "image_size": 64,
    }
    model = get_model("sgfr", evaluator=evaluator, **small)
    datamodule = Folder(
        name="studio",
        root=parts,
        normal_dir="good",
        test_split_mode="synthetic",
        val_split_mode=ValSplitMode.SYNTHETIC,
        num_workers=0,
    )
    stopping = EarlyStopping(monitor="pixel_AUROC", mode="max", patience=3)
    engine = Engine(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[stopping]
    )
    engine.train(model, datamodule=datamodule)
    assert float(stopping.best_score) > 0.5
    assert float(engine.model.post_processor.normalized_pixel_threshold) == pytest.approx(
        0.5, abs=0.5
    )
    checkpoint = engine.best_model_path
    path = engine.export(
        get_model("sgfr", **small),
        "openvino",
        export_root=tmp_path / "export",
        ckpt_path=checkpoint,
    )
    import openvino

    found = openvino.Core().compile_model(path, "CPU")(np.zeros((1, 3, 64, 64), np.float32))
    assert {"pred_score", "pred_label", "anomaly_map", "pred_mask"} <= {
        name for output in found for name in output.get_names()
    }


def test_private_names_of_anomalib_are_used_in_one_module_each() -> None:
    """A change of theirs is then a change of one file here."""
    private_names = ["_AUPRO", "_checkpoint_config_keys", "_compress_ov_model", "_image_threshold"]
    private_names += ["_pixel_threshold", "export_mixin", "TilerConfigurationCallback"]
    private_names += ["ALLOWED_MODULES"]
    texts = {
        str(file.relative_to(ROOT / "anomalib_sgfr")): file.read_text(encoding="utf-8")
        for file in (ROOT / "anomalib_sgfr").rglob("*.py")
    }
    code = {name: re.sub(r'"""(?:.|\n)*?"""', "", text) for name, text in texts.items()}
    for private in private_names:
        using = [name for name, text in code.items() if re.search(rf"\b{private}\b", text)]
        assert len(using) <= 1, (private, using)
    imported = {
        f"{source} {name}"
        for text in code.values()
        for source, names in re.findall(
            r"^\s*from (anomalib(?:\.\w+)*) import ([^(\n]+)$", text, re.MULTILINE
        )
        for name in re.split(r",\s*", names)
        if name.startswith("_") or "._" in source
    }
    # no other private name, nor a private module
    assert imported == {"anomalib.metrics.aupro _AUPRO"}
