"""A fit of a few made pictures, and whether what is exported of it gives the same answers."""

import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from anomalib_sgfr.commands.findings import Broken, Check, Finding

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from anomalib_sgfr.lightning_model import Sgfr

__all__ = ["Answer", "SelfTest", "compared", "judged"]

SIZE = 128
TOLERANCE = 1e-4  # of scores and maps, which lie between 0 and 1
_GOOD = 4
_REPORT = "report it, with what `anomalib-sgfr doctor --json` prints"
_REINSTALL = 'pip install --force-reinstall "anomalib[openvino]"'


class Answer(NamedTuple):
    """Score and map, shape ``(H, W)``, of a picture."""

    score: float
    map: "NDArray[np.float32]"


class SelfTest:
    """Two checks, of which the second goes on with the model that the first has fitted.

    A context, at whose end what they wrote is gone.
    """

    def __init__(self) -> None:
        self._left = ExitStack()
        self._model: Sgfr | None = None
        self._answers: list[Answer] = []
        self._folder = Path()

    def __enter__(self) -> Self:
        """Begin; the folder is made by the first check, whose line says if that fails."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Remove the folder."""
        del raised
        self._left.close()

    def checks(self) -> list[Check]:
        """The checks, in their order."""
        return [
            Check("fit and predict", self.fit_and_predict, _REPORT, ("plugin", "weights")),
            Check("export", self.export, _REINSTALL, ("fit and predict", "openvino", "OpenVINO devices")),
        ]

    def fit_and_predict(self) -> Finding:
        """Fit to pictures of nothing wrong; one with a blob must score above them.

        Raises:
            Broken: If it does not.
        """
        import numpy as np
        from anomalib.data import Folder, PredictDataset
        from anomalib.engine import Engine

        from anomalib_sgfr.lightning_model import Sgfr

        begun = time.monotonic()
        made = tempfile.TemporaryDirectory(prefix="sgfr-", ignore_cleanup_errors=True)
        self._folder = Path(self._left.enter_context(made))
        write_pictures(self._folder)
        # one early layer: a few operations to trace, which is most of an export's time
        model = Sgfr(layers=["blocks.1"], bank_size=100, image_size=SIZE, seed=0, visualizer=False, evaluator=False)
        engine = Engine(
            default_root_dir=self._folder,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
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
        found = {
            Path(path).stem: Answer(float(score), np.squeeze(chart.numpy()))
            for batch in batches
            for path, score, chart in zip(batch.image_path, batch.pred_score, batch.anomaly_map, strict=True)
        }
        good, bad = found["good"], found["bad"]
        self._model, self._answers = model, [good, bad]
        return judged(good, bad, time.monotonic() - begun)

    def export(self) -> Finding:
        """Export to OpenVINO, and compare what it answers there."""
        from anomalib_sgfr.inspector import Inspector

        begun = time.monotonic()
        if self._model is None:
            raise Broken(Finding("fault", "export", "nothing was fitted", _REPORT))
        file = self._model.to_openvino(self._folder / "exported", input_size=(SIZE, SIZE))
        inspector = Inspector.load(file)
        seen = [inspector(self._folder / "seen" / f"{name}.png") for name in ("good", "bad")]
        return compared(self._answers, [Answer(each.score, each.map) for each in seen], time.monotonic() - begun)


def judged(good: Answer, bad: Answer, seconds: float) -> Finding:
    """Whether a fitted model tells a blob from none.

    Args:
        good (Answer): Of a picture of nothing wrong.
        bad (Answer): Of one with a blob.
        seconds (float): That it took.

    Raises:
        Broken: If it does not, or if an answer is not finite.
    """
    value = f"a blob scores {bad.score:.3f}, none {good.score:.3f}"
    finite = all(math.isfinite(float(each.map.sum())) for each in (good, bad))
    if not finite or not bad.score > good.score:  # nor is what is not a number
        value += "" if finite else ", and maps are not finite"
        raise Broken(Finding("fault", "fit and predict", value, _REPORT))
    return Finding("ok", "fit and predict", f"{value}, in {seconds:.1f} s")


def compared(here: Sequence[Answer], there: Sequence[Answer], seconds: float) -> Finding:
    """Whether two runners of one model give the same answers.

    Args:
        here (Sequence[Answer]): PyTorch's, of each picture.
        there (Sequence[Answer]): OpenVINO's.
        seconds (float): That it took.
    """
    import numpy as np

    pairs = list(zip(here, there, strict=True))
    scores = float(
        np.max([abs(one.score - other.score) for one, other in pairs])
    )  # not Python's, which may pass nan by
    maps = float(np.max([np.abs(one.map - other.map).max() for one, other in pairs]))
    value = f"OpenVINO's scores differ by {scores:.1e}, maps by {maps:.1e}"
    if not scores <= TOLERANCE or not maps <= TOLERANCE:  # what is not a number is not less either
        return Finding(
            "fault", "export", f"{value}, more than {TOLERANCE:.0e}", f"{_REINSTALL}; if that is no help, {_REPORT}"
        )
    return Finding("ok", "export", f"{value}, in {seconds:.1f} s")


def write_pictures(folder: Path) -> None:
    """Write noisy grids, ``good`` to fit and one of each kind in ``seen``, with a blob in the ``bad``."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[:SIZE, :SIZE]
    blob = (rows - SIZE // 2) ** 2 + (columns - SIZE // 3) ** 2 < (SIZE // 8) ** 2
    files = [*(f"good/{number}" for number in range(_GOOD)), "seen/good", "seen/bad", "bad/0"]
    for number, name in enumerate(files):
        noise = np.random.default_rng(number).normal(0, 6, (SIZE, SIZE))
        picture = 110 + 40 * np.sin(rows / 5) * np.cos(columns / 5) + noise
        if "bad" in name:
            picture[blob] = 250
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).convert("RGB").save(file)
