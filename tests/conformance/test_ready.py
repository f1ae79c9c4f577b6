"""Ready for what anomalib may become, and for who drives it: other forms of its registry, Studio's sequence."""

import os
import re
import subprocess
import sys
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

ROOT = Path(__file__).parents[2]
# anomalib.models as it is, changed once it has been executed: what the next version may do
_CHANGED = """
import sys, warnings
warnings.simplefilter("ignore")
warnings.filterwarnings("always", message="anomalib_sgfr could not")
class Changing:
    def find_spec(self, name, path=None, target=None):
        if name != "anomalib.models":
            return None
        from importlib.machinery import PathFinder
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def changed(m):
            execute(m)
            {change}
        spec.loader.exec_module = changed
        return spec
sys.meta_path.insert(0, Changing())
import anomalib_sgfr
{first}
import anomalib.models as m
from anomalib_sgfr import Sgfr
from anomalib.cli import AnomalibCLI
sys.argv = ["anomalib"]
AnomalibCLI(["train", "--model", "anomalib_sgfr.Sgfr", "--model.bank_size", "7"], run=False)
print("registered" if getattr(m, "Sgfr", None) is Sgfr else "not registered")
print(m.get_model({{"class_path": "anomalib_sgfr.Sgfr"}}).__class__.__name__ if {asked} else "not asked")
"""
CHANGES = {
    "frozen": ("m.ALLOWED_MODULES, m.__all__ = frozenset(m.ALLOWED_MODULES), tuple(m.__all__)", True, 0),
    "without a list of modules": ("del m.ALLOWED_MODULES", False, 1),
    "without a list of names": ("del m.__all__", True, 1),
    "lazy": ("last = m.get_model; del m.get_model; m.__getattr__ = lambda name: {'get_model': last}[name]", True, 0),
    "moved": ("del m.get_model", False, 0),
    "locked": (
        "m.__class__ = type('Locked', (type(m),), {'__setattr__': lambda *_: (_ for _ in ()).throw(TypeError('no'))})",
        False,
        1,
    ),
}


@pytest.mark.parametrize("first", ["", "import anomalib_sgfr.lightning_model"], ids=["anomalib first", "Sgfr first"])
@pytest.mark.parametrize("how", CHANGES)
def test_another_registry_costs_a_warning_at_most(how: str, first: str, tmp_path: Path) -> None:
    change, asked, warned = CHANGES[how]
    change = change.replace("{", "{{").replace("}", "}}") if False else change
    code = _CHANGED.replace("{change}", change).replace("{first}", first).replace("{asked}", str(asked))
    done = subprocess.run(
        [sys.executable, "-c", code.replace("{{", "{").replace("}}", "}")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("anomalib_sgfr could not register") == warned, done.stderr[-3000:]
    registered, made = done.stdout.splitlines()[-2:]
    assert registered == ("registered" if how != "locked" else "not registered")
    assert made == ("Sgfr" if asked else "not asked")


def test_it_is_a_direct_subclass_which_alone_are_listed() -> None:
    assert Sgfr in AnomalibModule.__subclasses__()
    assert "sgfr" in list_models()
    assert "Sgfr" in list_models(case="pascal")


def test_the_sequence_of_studio(parts: Path, tmp_path: Path) -> None:
    assert "sgfr" in list_models()
    fields = ["anomaly_map", "gt_mask"]
    evaluator = Evaluator(
        val_metrics=[AUROC(["pred_score", "gt_label"], prefix="image_"), AUROC(fields, prefix="pixel_", strict=False)],
        test_metrics=[F1Score(["pred_label", "gt_label"], prefix="image_")],
    )
    small = {"backbone": "test_resnet", "layers": ["layer1"], "pre_trained": False, "bank_size": 50, "image_size": 64}
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
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[stopping])
    engine.train(model, datamodule=datamodule)
    assert float(stopping.best_score) > 0.5
    assert float(engine.model.post_processor.normalized_pixel_threshold) == pytest.approx(0.5, abs=0.5)
    checkpoint = engine.best_model_path
    path = engine.export(get_model("sgfr", **small), "openvino", export_root=tmp_path / "export", ckpt_path=checkpoint)
    import openvino

    found = openvino.Core().compile_model(path, "CPU")(np.zeros((1, 3, 64, 64), np.float32))
    assert {"pred_score", "pred_label", "anomaly_map", "pred_mask"} <= {
        name for output in found for name in output.get_names()
    }


def test_private_names_of_anomalib_are_used_in_one_module_each() -> None:
    """So that a change of theirs is a change of one file here."""
    used: dict[str, set[str]] = {}
    for file in sorted((ROOT / "anomalib_sgfr").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for source, names in re.findall(r"^\s*from (anomalib[\w.]*) import \(?([^()]*?)\)?$", text, re.MULTILINE):
            if source.split(".")[0] != "anomalib":
                continue
            private = [name.split(" as ")[0].strip() for name in names.split(",")]
            for name in private:
                if name.startswith("_") or any(part.startswith("_") for part in source.split(".")):
                    used.setdefault(f"{source}.{name}", set()).add(file.name)
        for name in ("_image_threshold", "_pixel_threshold", "_checkpoint_config_keys", "_compress_ov_model", "_AUPRO"):
            if re.search(rf"\b{name}\b", text):
                used.setdefault(name, set()).add(file.name)
    print(used)
