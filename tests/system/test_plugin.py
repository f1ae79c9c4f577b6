"""Registration with anomalib: what it adds, and that it never does harm.

No case has anomalib imported before it: each runs in an interpreter of its own, or in a fork of one
that has imported only what others wrote. The plugin is switched on by hand where no installation
does it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import anomalib_sgfr

REPOSITORY = Path(__file__).parents[2]
FIRST = str(Path(__file__).with_name("first_imports.py"))
INSTALL = "import anomalib_sgfr.plugin; anomalib_sgfr.plugin.install(); "


def python(
    code: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code without site-packages' start-up files (-S would lose the packages: paths are passed
    on instead).
    """
    paths = [str(REPOSITORY), *([str(path)] if path else [])]
    search = os.pathsep.join(
        [*reversed(paths), *(item for item in sys.path if "site-packages" in item)]
    )
    return subprocess.run(
        [sys.executable, "-S", "-W", "default", "-c", code],
        env={
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "PYTHONPATH": search,
            **environment,
        },
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


SHORT_NAMES = (
    "from anomalib.models import get_model, list_models, Sgfr; import anomalib.data,"
    " anomalib.models, sys;assert 'sgfr' in list_models() and 'Sgfr' in"
    " anomalib.models.__all__;assert type(get_model('sgfr')) is type(get_model({'class_path':"
    " 'Sgfr'})) is Sgfr;assert type(get_model({'class_path': 'anomalib_sgfr.Sgfr', 'init_args':"
    " {'num_atoms': 3}})) is Sgfr;assert anomalib.data.ELPV is"
    " anomalib.data.get_datamodule({'class_path': 'ELPV'}).__class__;assert 'MTD' in"
    " anomalib.data.__all__;assert ['_RegisterOnImport' in type(finder).__name__ for finder in"
    " sys.meta_path].count(True) == 1"
)
ONE_CLASS = (  # a module that is executed twice makes two
    "; from anomalib.models.components import AnomalibModule;"
    "assert [kind.__name__ for kind in AnomalibModule.__subclasses__()].count('Sgfr') == 1"
)
ONCE = (
    "; assert anomalib.models.Sgfr is Sgfr;"
    "assert anomalib.models.__all__.count('Sgfr') == 1 and len(anomalib.models.list_models()) > 10"
    + ONE_CLASS
)
ORDERS = [
    "from anomalib_sgfr import Sgfr; import anomalib.models",
    "import anomalib.models; from anomalib_sgfr import Sgfr",
    "import anomalib_sgfr.data; from anomalib_sgfr import Sgfr; import anomalib.models",
    "import anomalib.data; import anomalib.models; from anomalib.models import Sgfr",
    "from anomalib_sgfr import SgfrModel; import anomalib.models; from anomalib_sgfr import Sgfr",
    (
        "import anomalib_sgfr.features.embedding; import anomalib.models; from anomalib.models"
        " import Sgfr"
    ),
    (
        "import anomalib.models.components; from anomalib_sgfr.lightning_model import Sgfr; import"
        " anomalib.models"
    ),
]
DATA_FIRST = "from anomalib.data import MTD, ELPV; import anomalib.models; anomalib.models.Sgfr"
FRONT = (
    "import sys, importlib.machinery as m; sys.meta_path.insert(0, type('Front', (), {'find_spec':"
    " lambda *a: m.PathFinder.find_spec(*a[1:])"
)
RELOAD = "import anomalib.models as m, importlib; importlib.reload"
USES = [
    # looked for, not imported
    (
        "import importlib.util; importlib.util.find_spec('anomalib.models'); from anomalib.models"
        " import Sgfr"
    ),
    # somebody else's finder in front, of anomalib.models alone or of everything
    (
        f"{FRONT} if a[1] == 'anomalib.models' else None}})()); import anomalib.models;"
        f" anomalib.models.Sgfr{ONE_CLASS}"
    ),
    f"{FRONT}}})()); from anomalib.models import Sgfr{ONE_CLASS}",
    (
        f"{FRONT}}})()); import anomalib.models; import anomalib.visualization,"
        f" anomalib.engine{ONE_CLASS}"
    ),
    # one that finds nothing, as setuptools puts there at the start of an interpreter
    f"{FRONT} if 0 else None}})()); import anomalib.models; anomalib.models.Sgfr{ONE_CLASS}",
    # executed once more
    (
        f"{RELOAD}(m); assert m.__all__.count('Sgfr') == 1; m.get_model({{'class_path':"
        " 'anomalib_sgfr.Sgfr'})"
    ),
    "import anomalib.data as d, importlib; importlib.reload(d); assert d.__all__.count('MTD') == 1",
]
MODULES = [
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((REPOSITORY / "anomalib_sgfr").rglob("*.py"))
    if path.name != "__main__.py"
]
AFTER = (
    "from anomalib.models import Sgfr, get_model; from anomalib.data import MTD, ELPV;"
    " get_model('Sgfr', backbone='test_resnet', layers=['layer1'], score_layers=['layer1'],"
    " pre_trained=False)"
)
WAITING = (
    "names = [type(finder).__name__ for finder in sys.meta_path];"
    " assert sum('_RegisterOnImport' in name for name in names) == 1"
)
IMPORTED_FIRST = [
    # where anomalib is not imported by then, what waits for it must be waiting still, once
    f"import sys, anomalib_sgfr; {first}\nif 'anomalib' in sys.modules: {AFTER}\nelse: {WAITING}"
    for first in (
        *(f"anomalib_sgfr.{name}" for name in anomalib_sgfr.__all__),
        *(f"import {module}" for module in MODULES),
    )
]
LAZY = "import anomalib_sgfr; [getattr(anomalib_sgfr, name) for name in anomalib_sgfr.__all__]"

needs_forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each of the statements above said when it was run first: nothing, if all is well."""
    switched_on = [SHORT_NAMES, *(INSTALL + order + ONCE for order in ORDERS), DATA_FIRST, *USES]
    statements = [*(INSTALL + statement for statement in switched_on), *IMPORTED_FIRST, LAZY]
    result = python(
        f"import runpy, sys; sys.argv = ['', {json.dumps(statements)!r}]; runpy.run_path({FIRST!r},"
        " None, '__main__')"
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_forks
def test_short_names_are_known_once_anomalib_is_imported(said: dict[str, str]) -> None:
    assert said[INSTALL + SHORT_NAMES] == ""


@needs_forks
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports_registers_once(order: str, said: dict[str, str]) -> None:
    assert said[INSTALL + INSTALL + order + ONCE] == ""


@needs_forks
def test_every_name_and_module_imports_first_and_registers(said: dict[str, str]) -> None:
    """Where no start-up file is read."""
    failed = [said[statement] for statement in IMPORTED_FIRST if said[statement]]
    assert not failed, "\n".join(failed)


@needs_forks
def test_the_datamodules_need_no_models_imported_first(said: dict[str, str]) -> None:
    assert said[INSTALL + DATA_FIRST] == ""


@needs_forks
@pytest.mark.parametrize("use", USES)
def test_nothing_uses_up_or_passes_by_the_registration(use: str, said: dict[str, str]) -> None:
    assert said[INSTALL + use] == ""


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
    assert set(result.stdout.split()) - set(before) <= {
        "anomalib_sgfr",
        "anomalib_sgfr.aliases",
        "anomalib_sgfr.plugin",
    }, result.stderr


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
    code = (
        "try:\n    import anomalib.models\nexcept ModuleNotFoundError as error: print(error.name)"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {INSTALL}\n{code}",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.stdout == "anomalib\n", result.stderr


def test_the_imported_module_looks_untouched() -> None:
    result = python(
        INSTALL + "import anomalib.models as m, importlib, importlib.resources as r;assert"
        " type(m.__loader__).__module__ != 'anomalib_sgfr.plugin' and m.__spec__.loader is"
        " m.__loader__;assert r.files('anomalib.models').joinpath('__init__.py').is_file()"
    )
    assert result.returncode == 0, result.stderr


@needs_forks
def test_public_names_are_lazy_and_listed(said: dict[str, str]) -> None:
    result = python(
        "import anomalib_sgfr, sys; assert 'torch' not in sys.modules;"
        "assert set(anomalib_sgfr.__all__) <= set(dir(anomalib_sgfr));"
        "print(hasattr(anomalib_sgfr, 'nothing'))"
    )
    assert result.stdout.endswith("False\n"), result.stderr
    assert said[LAZY] == ""
