"""Self-test of ``anomalib-sgfr doctor``: a fit of a few synthetic images, and its export."""

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from anomalib_sgfr.cli.checks import Check, CheckFailed, CheckResult

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from anomalib_sgfr.lightning_model import Sgfr

__all__ = ["Answer", "SelfTest", "check_scores", "compare_answers", "write_images"]

SIZE = 128  # height and width of the synthetic images, in pixels
TOLERANCE = 1e-4  # of scores and maps, which lie between 0 and 1
_GOOD = 4  # images to fit
_REPORT = "report it, with what `anomalib-sgfr doctor --json` prints"
_REINSTALL = 'pip install --force-reinstall "anomalib[openvino]"'


class Answer(NamedTuple):
    """Score and anomaly map, shape ``(H, W)``, of an image."""

    score: float
    map: "NDArray[np.float32]"


class SelfTest:
    """Two checks: fit a model to synthetic images; export the same model.

    A context manager, which removes the files of the checks at its end.
    """

    def __init__(self) -> None:
        self._exit = ExitStack()
        self._model: Sgfr | None = None
        self._answers: list[Answer] = []
        self._folder = Path()

    def __enter__(self) -> Self:
        """Make nothing yet: the first check makes the folder, and reports if that fails."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Remove the folder."""
        del raised
        self._exit.close()

    def checks(self) -> list[Check]:
        """The checks, in their order."""
        needs = ("fit and predict", "openvino", "OpenVINO devices")
        return [
            Check("fit and predict", self.fit_and_predict, _REPORT, ("plugin", "weights")),
            Check("export", self.export, _REINSTALL, needs),
        ]

    def fit_and_predict(self) -> CheckResult:
        """Fit to good images; an image with a blob must score above a good one.

        Raises:
            CheckFailed: If it does not.
        """
        import numpy as np
        from anomalib.data import Folder, PredictDataset

        from anomalib_sgfr.console import quiet_engine
        from anomalib_sgfr.lightning_model import Sgfr

        begun = time.monotonic()
        folder = tempfile.TemporaryDirectory(prefix="sgfr-", ignore_cleanup_errors=True)
        self._folder = Path(self._exit.enter_context(folder))
        write_images(self._folder)
        # one early layer: tracing its few operations keeps the export short
        model = Sgfr(
            layers=["blocks.1"],
            bank_size=100,
            image_size=SIZE,
            seed=0,
            visualizer=False,
            evaluator=False,
        )
        engine = quiet_engine(self._folder)
        data = Folder(
            name="made",
            root=self._folder,
            normal_dir="good",
            abnormal_dir="bad",
            val_split_mode="same_as_test",
            train_batch_size=_GOOD,
            eval_batch_size=_GOOD,
            num_workers=0,
            seed=0,
        )
        engine.fit(model, datamodule=data)
        batches: Any = engine.predict(model, dataset=PredictDataset(self._folder / "seen"))
        found = {}
        for batch in batches:
            items = (batch.image_path, batch.pred_score, batch.anomaly_map)
            for path, score, anomaly_map in zip(*items, strict=True):
                found[Path(path).stem] = Answer(float(score), np.squeeze(anomaly_map.numpy()))
        good, bad = found["good"], found["bad"]
        self._model, self._answers = model, [good, bad]
        return check_scores(good, bad, time.monotonic() - begun)

    def export(self) -> CheckResult:
        """Export the model to OpenVINO and compare the answers."""
        from anomalib_sgfr.inspector import Inspector

        begun = time.monotonic()
        if self._model is None:
            raise CheckFailed(CheckResult("fault", "export", "nothing was fitted", _REPORT))
        file = self._model.to_openvino(self._folder / "exported", input_size=(SIZE, SIZE))
        inspector = Inspector.load(file)
        found = [inspector(self._folder / "seen" / f"{name}.png") for name in ("good", "bad")]
        answers = [Answer(each.score, each.map) for each in found]
        return compare_answers(self._answers, answers, time.monotonic() - begun)


def check_scores(good: Answer, bad: Answer, seconds: float) -> CheckResult:
    """Check that a fitted model gives an image with a blob the higher score.

    Args:
        good (Answer): Answer for a good image.
        bad (Answer): Answer for an image with a blob.
        seconds (float): Duration of the fit and the prediction.

    Raises:
        CheckFailed: If it does not, or if a score or map is not finite.
    """
    value = f"a blob scores {bad.score:.3f}, none {good.score:.3f}"
    finite = all(math.isfinite(float(each.map.sum())) for each in (good, bad))
    if not finite or not bad.score > good.score:  # also where a score is NaN
        value += "" if finite else ", and maps are not finite"
        raise CheckFailed(CheckResult("fault", "fit and predict", value, _REPORT))
    return CheckResult("ok", "fit and predict", f"{value}, in {seconds:.1f} s")


def compare_answers(here: Sequence[Answer], there: Sequence[Answer], seconds: float) -> CheckResult:
    """Check that PyTorch and OpenVINO give the same answers.

    Args:
        here (Sequence[Answer]): PyTorch's, one for each image.
        there (Sequence[Answer]): OpenVINO's.
        seconds (float): Duration of the export and the comparison.
    """
    import numpy as np

    pairs = list(zip(here, there, strict=True))
    # NumPy's maximum keeps NaN; Python's may not
    scores = float(np.max([abs(one.score - other.score) for one, other in pairs]))
    maps = float(np.max([np.abs(one.map - other.map).max() for one, other in pairs]))
    value = f"OpenVINO's scores differ by {scores:.1e}, maps by {maps:.1e}"
    if not (scores <= TOLERANCE and maps <= TOLERANCE):  # also where one is NaN
        remedy = f"{_REINSTALL}; if that is no help, {_REPORT}"
        return CheckResult("fault", "export", f"{value}, more than {TOLERANCE:.0e}", remedy)
    return CheckResult("ok", "export", f"{value}, in {seconds:.1f} s")


def write_images(folder: Path) -> None:
    """Write noisy grids: ``good`` to fit, ``bad`` with a blob, and one of each in ``seen``."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[:SIZE, :SIZE]
    blob = (rows - SIZE // 2) ** 2 + (columns - SIZE // 3) ** 2 < (SIZE // 8) ** 2
    files = [*(f"good/{number}" for number in range(_GOOD)), "seen/good", "seen/bad", "bad/0"]
    for number, name in enumerate(files):
        noise = np.random.default_rng(number).normal(0, 6, (SIZE, SIZE))
        image = 110 + 40 * np.sin(rows / 5) * np.cos(columns / 5) + noise
        if "bad" in name:
            image[blob] = 250
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).convert("RGB").save(file)
