"""Registration with anomalib: what it adds, and that it never does harm.

Each case runs in an interpreter of its own, with the plugin switched on by hand where no installation does it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
INSTALL = "import anomalib_sgfr.plugin; anomalib_sgfr.plugin.install(); "


def python(code: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code without site-packages' start-up files (-S would lose the packages: paths are passed on instead)."""
    paths = [str(REPOSITORY), *([str(path)] if path else [])]
    search = os.pathsep.join([*reversed(paths), *(item for item in sys.path if "site-packages" in item)])
    return subprocess.run(
        [sys.executable, "-S", "-W", "default", "-c", code],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": search, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_anomalib(folder: Path, models: str) -> Path:
    """A package of that name whose ``models`` module holds the given code."""
    (folder / "anomalib" / "models").mkdir(parents=True)
    (folder / "anomalib" / "__init__.py").touch()
    (folder / "anomalib" / "models" / "__init__.py").write_text(models, encoding="utf-8")
    return folder


def test_short_names_are_known_once_anomalib_is_imported() -> None:
    result = python(
        INSTALL
        + "from anomalib.models import get_model, list_models, Sgfr; import anomalib.data, anomalib.models, sys;"
        "assert 'sgfr' in list_models() and 'Sgfr' in anomalib.models.__all__;"
        "assert type(get_model('sgfr')) is type(get_model({'class_path': 'Sgfr'})) is Sgfr;"
        "assert type(get_model({'class_path': 'anomalib_sgfr.Sgfr', 'init_args': {'num_atoms': 3}})) is Sgfr;"
        "assert anomalib.data.ELPV is anomalib.data.get_datamodule({'class_path': 'ELPV'}).__class__;"
        "assert 'MTD' in anomalib.data.__all__;"
        "assert not any('_AfterImport' in type(finder).__name__ for finder in sys.meta_path)"
    )
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning" not in result.stderr


@pytest.mark.parametrize(
    "order",
    [
        "from anomalib_sgfr import Sgfr; import anomalib.models",
        "import anomalib.models; from anomalib_sgfr import Sgfr",
        "import anomalib_sgfr.data; from anomalib_sgfr import Sgfr; import anomalib.models",
        "import anomalib.data; import anomalib.models; from anomalib.models import Sgfr",
        "from anomalib_sgfr import SgfrModel; import anomalib.models; from anomalib_sgfr import Sgfr",
        "import anomalib_sgfr.embedding; import anomalib.models; from anomalib.models import Sgfr",
        "import anomalib.models.components; from anomalib_sgfr.lightning_model import Sgfr; import anomalib.models",
    ],
)
def test_any_order_of_imports_registers_once(order: str) -> None:
    result = python(
        INSTALL + INSTALL + order + "; assert anomalib.models.Sgfr is Sgfr;"
        "assert anomalib.models.__all__.count('Sgfr') == 1 and len(anomalib.models.list_models()) > 10"
    )
    assert result.returncode == 0, result.stderr
    assert "RuntimeWarning" not in result.stderr


@pytest.mark.parametrize("name", ["Sgfr", "SgfrModel"])
def test_without_the_start_up_file_importing_sgfr_registers_too(name: str) -> None:
    result = python(f"from anomalib_sgfr import {name}; from anomalib.models import get_model; get_model('Sgfr')")
    assert result.returncode == 0, result.stderr


def test_the_switch_turns_it_off() -> None:
    result = python(
        INSTALL + "import anomalib.models; assert not hasattr(anomalib.models, 'Sgfr');"
        "from anomalib_sgfr import Sgfr; assert not hasattr(anomalib.models, 'Sgfr'); Sgfr()",
        ANOMALIB_SGFR_PLUGIN="0",
    )
    assert result.returncode == 0, result.stderr


def test_installing_imports_nothing_heavy() -> None:
    before = python("import os, sys; print(*sorted(sys.modules))").stdout.split()
    result = python(INSTALL + "import os, sys; print(*sorted(sys.modules))")
    assert set(result.stdout.split()) - set(before) <= {"anomalib_sgfr", "anomalib_sgfr.plugin"}, result.stderr


def test_a_broken_anomalib_fails_as_it_would_without_us(tmp_path: Path) -> None:
    fake_anomalib(tmp_path, "raise OSError('broken')")
    code = "try:\n    import anomalib.models\nexcept OSError as error: print(error)"
    assert python(INSTALL + "\n" + code, tmp_path).stdout == "broken\n"
    twice = python(f"{INSTALL}\n{code}\n{code}", tmp_path)
    assert twice.stdout == "broken\nbroken\n", twice.stderr


def test_an_anomalib_that_sgfr_cannot_use_still_imports(tmp_path: Path) -> None:
    fake_anomalib(tmp_path, "answer = 42")
    result = python(INSTALL + "import anomalib.models; print(anomalib.models.answer)", tmp_path)
    assert result.stdout == "42\n", result.stderr
    assert "RuntimeWarning: anomalib_sgfr could not register" in result.stderr


def test_no_anomalib_is_no_problem(tmp_path: Path) -> None:
    code = "try:\n    import anomalib.models\nexcept ModuleNotFoundError as error: print(error.name)"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {INSTALL}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.stdout == "anomalib\n", result.stderr


def test_the_imported_module_looks_untouched() -> None:
    result = python(
        INSTALL + "import anomalib.models as m, importlib, importlib.resources as r;"
        "assert type(m.__loader__).__module__ != 'anomalib_sgfr.plugin' and m.__spec__.loader is m.__loader__;"
        "assert r.files('anomalib.models').joinpath('__init__.py').is_file()"
    )
    assert result.returncode == 0, result.stderr


def test_public_names_are_lazy_and_listed() -> None:
    result = python(
        "import anomalib_sgfr, sys; assert 'torch' not in sys.modules;"
        "assert set(anomalib_sgfr.__all__) <= set(dir(anomalib_sgfr));"
        "[getattr(anomalib_sgfr, name) for name in anomalib_sgfr.__all__];"
        "print(hasattr(anomalib_sgfr, 'nothing'))"
    )
    assert result.stdout.endswith("False\n"), result.stderr
