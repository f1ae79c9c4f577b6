"""How much of the method its tests hold: change it here and there, list changes that none notices.

The method is ``anomalib_sgfr.core`` and the thresholds of ``anomalib_sgfr.post_processing``.

``python -m tests.mutate`` runs the tests once, noting how long each takes and which functions it
calls. Then each mutant is grafted onto the code in a fork, where the tests that call its function
run, the quickest first, until one fails. Tests beyond a budget of seconds are left out, so that the
score is a lower bound. A mutant that takes far longer than the code itself is killed. Docstrings,
annotations, ``__all__`` and errors' texts stay as they are.
"""

import argparse
import ast
import functools
import hashlib
import inspect
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import NamedTuple

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_threads] = "1"  # a fork inherits no other thread

import pytest  # noqa: E402
from _pytest.runner import runtestprotocol  # noqa: E402

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "anomalib_sgfr"
WANTED = 0.9
ELSEWHERE = {"gpu", "triton_kernels"}  # tested in a process of their own, or on a GPU
TESTS = ["tests/unit/core", "tests/unit/post_processing"]
SOURCES = {
    path.stem: path
    for path in (
        *(PACKAGE / "core").glob("*.py"),
        PACKAGE / "post_processing" / "thresholds.py",
    )
    if path.stem not in ELSEWHERE
}

# Changes that cannot be seen: module, regular expressions for the line and for the change, and why.
EQUIVALENT = [
    (".*", "strict=", "True -> False", "what is zipped has one length"),
    (
        ".*",
        "^(_ROWS|_PRODUCT_VALUES|_GROUP|_CANDIDATES|_FIRST_STAGE|_TOGETHER)",
        "[0-9]+ -> .*",
        "sizes of blocks",
    ),
    ("linear_algebra", r"_PRODUCT_VALUES\) // max", "1 -> [02]", "sizes of blocks"),
    ("clusters", r"2 \* done", "2 -> 3", "sizes of blocks"),
    ("clusters", r"rounding = 2\.0", r"2\.0 -> .*", "margin for rounding"),
    ("k_center", r"same = 8\.0", r"8\.0 -> .*", "margin for rounding"),
    ("linear_algebra", r"return 32\.0", r"32\.0 -> .*", "margin for rounding"),
    ("neighbours", "far = ", "4.0 -> .*", "as far"),
    ("linear_algebra", "k = matrix.shape", "USub.*|1 -> 2", "the matrix is square"),
    (
        "linear_algebra",
        r"safe_reciprocal\(diagonal",
        r"clamp_min dropped|0\.0 -> -1\.0",
        "NaN exceeds no floor either",
    ),
    ("linear_algebra", "remaining = ", r"1\.0 -> .*", "what is left is rounding then, and dropped"),
    (
        "linear_algebra",
        r"keep = keep \+",
        "Add -> Sub|GtE",
        "a sign that is squared; a pivot at the tolerance",
    ),
    (
        "linear_algebra",
        r"torch\.where\(usable",
        "ones_like -> zeros_like",
        "infinity that is not chosen",
    ),
    ("certificate", "num_atoms > 1 and regularisation > 0", "GtE", "the share is zero then"),
    ("clusters", "least = torch.full_like", "0 -> 1", "a column for its length"),
    ("thresholds", "f1 = 2", r"2 -> [13]", "a factor of all"),
    ("thresholds", "np.unique", "swapped", "sorted afterwards"),
    ("thresholds", r"^_ROUNDING = ", "1e-09 -> 1.*", "margin for rounding"),
    (
        "self_expression",
        "_WELL_CONDITIONED",
        r"0\.0001 -> 0\.1|LtE|NotEq|1 -> [02]",
        "two ways to one length",
    ),
    ("self_expression", r"k \+ 1, bank\.shape", "1 -> 2", "one neighbour more than is used"),
    ("self_expression", r"for _ in range\(2\)", "2 -> 3", "one refinement more than is needed"),
]

COMPARED = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
PAIRS = ("amax amin", "max min", "argmax argmin", "maximum minimum", "any all", "zeros ones")
PAIRS += ("zeros_like ones_like", "sum mean", "triu tril")
RENAMED = {"ceil": "floor", "clamp_min": "clamp_max"}
for _one, _other in map(str.split, PAIRS):
    RENAMED |= {_one: _other, _other: _one}
DROPPED = {"clamp", "clamp_min", "clone", "sqrt", "square", "abs"}
TOLERANCE = 1e-3  # a number below it, or above its inverse, changes by a factor


class Mutant(NamedTuple):
    """A change: of which node, counted as :func:`ast.walk` does, to which of its variants."""

    module: str
    line: int
    column: int
    change: str
    text: str
    function: str
    node: int
    variant: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line}:{self.column} {self.change:24} | {self.text}"

    @property
    def equivalent(self) -> str | None:
        for module, text, change, why in EQUIVALENT:
            if (
                re.fullmatch(module, self.module)
                and re.search(text, self.text)
                and re.fullmatch(change, self.change)
            ):
                return why
        return None


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:  # noqa: C901, PLR0912
    """What a node is changed to."""
    match node:
        case ast.Compare(ops=[operator]):
            for other in COMPARED[type(operator)]:
                yield type(other()).__name__, ast.Compare(node.left, [other()], node.comparators)
        case ast.Compare():
            for index, operator in enumerate(node.ops):
                for other in COMPARED[type(operator)]:
                    changed = [*node.ops[:index], other(), *node.ops[index + 1 :]]
                    yield (
                        f"{index} {other.__name__}",
                        ast.Compare(node.left, changed, node.comparators),
                    )
        case ast.BinOp() if type(node.op) in COMPUTED:
            yield "", ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right)
        case ast.AugAssign() if type(node.op) in COMPUTED:
            yield "", ast.AugAssign(node.target, COMPUTED[type(node.op)](), node.value)
            yield "dropped", ast.Pass()
        case ast.BoolOp():
            yield (
                "",
                ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values),
            )
        case ast.UnaryOp():
            yield "", node.operand
        case ast.Constant(value=bool()):
            yield "", ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield "", ast.Constant(node.value + 1)
            if node.value:  # an axis or a row of -1 is often the same as 0
                yield "", ast.Constant(node.value - 1)
        case ast.Constant(value=float()):
            extreme = not (node.value == 0.0 or TOLERANCE <= node.value <= 1.0 / TOLERANCE)
            yield "", ast.Constant(node.value * 1000 if extreme else node.value + 1)
            yield "", ast.Constant(0.0 if extreme else node.value - 1)
        case ast.Name(id=name) if name in RENAMED and isinstance(node.ctx, ast.Load):
            yield "", ast.Name(RENAMED[name], node.ctx)
        case ast.Attribute(attr=name) if name in RENAMED:
            yield "", ast.Attribute(node.value, RENAMED[name], node.ctx)
        case ast.Call(func=ast.Attribute(attr=name)) if name in DROPPED:
            yield f"{name} dropped", node.func.value
        case ast.Call(func=ast.Name(id=name), args=[one, other, *rest]) if name[0].isupper():
            yield "swapped", ast.Call(node.func, [other, one, *rest], node.keywords)
        case ast.Tuple(elts=[one, other], ctx=ast.Load()):
            yield "swapped", ast.Tuple([other, one], node.ctx)
        case ast.If() | ast.While() | ast.IfExp() if isinstance(node.test, ast.Name | ast.Call):
            changed = type(node)(
                **{**dict(ast.iter_fields(node)), "test": ast.UnaryOp(ast.Not(), node.test)}
            )
            yield "negated", changed
        case ast.Expr() | ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield "dropped", ast.Pass()


def changeable(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Nodes that may change, each with the function it is in."""
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]
    while waiting:
        node, function = waiting.pop()
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.Assign) and (
            ast.unparse(node.targets[0]) in {"__all__", "msg"}
            or ast.unparse(node.value).startswith("Literal")
        ):
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = function if function.endswith("()") else f"{function}{node.name}"
            inner += "." if isinstance(node, ast.ClassDef) else "" if inner.endswith("()") else "()"
            body: list[ast.AST] = list(node.body)
            if isinstance(node, ast.FunctionDef):
                body += [
                    *node.args.defaults,
                    *(default for default in node.args.kw_defaults if default),
                ]
            waiting += [(child, inner) for child in reversed(body)]
            continue
        if hasattr(node, "lineno"):
            yield node, function
        left_out = [node.annotation] if isinstance(node, ast.AnnAssign) else []
        children = [child for child in ast.iter_child_nodes(node) if child not in left_out]
        waiting += [(child, function) for child in reversed(children)]


@functools.cache
def source_of(module: str) -> str:
    return SOURCES[module].read_text()


def mutants_of(module: str) -> list[Mutant]:
    source = source_of(module)
    tree, lines = ast.parse(source), source.splitlines()
    numbers = {id(node): number for number, node in enumerate(ast.walk(tree))}
    found = []
    for node, function in changeable(tree):
        for index, (label, other) in enumerate(variants(node)):
            change = label or f"{_short(node)} -> {_short(other)}"
            place = node.lineno, node.col_offset + 1  # type: ignore[attr-defined]
            text = lines[place[0] - 1].strip()
            found.append(Mutant(module, *place, change, text, function, numbers[id(node)], index))
    return found


def _short(node: ast.AST) -> str:
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp | ast.UnaryOp):
        return type(node.op).__name__
    return node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)[:20]


def code_of(mutant: Mutant) -> CodeType:
    """The module with the change."""
    tree = ast.parse(source_of(mutant.module))
    old = list(ast.walk(tree))[mutant.node]
    new = [other for _, other in variants(old)][mutant.variant]

    class Change(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return ast.copy_location(new, node) if node is old else self.generic_visit(node)

    changed = ast.fix_missing_locations(Change().visit(tree))
    return compile(changed, str(SOURCES[mutant.module]), "exec")


def graft(module: ModuleType, code: CodeType) -> None:
    """Give functions and constants, wherever they were imported to, the code and the values of
    another version.
    """
    namespace = {
        "__name__": module.__name__,
        "__file__": module.__file__,
        "__package__": module.__package__,
    }
    exec(code, namespace)
    for name, new in namespace.items():
        old = vars(module).get(name)
        if inspect.isclass(new) and new.__module__ == module.__name__:
            for attribute, method in vars(new).items():
                _graft_function(vars(old).get(attribute), method)
        elif callable(new):
            if getattr(new, "__module__", None) == module.__name__:
                _graft_function(old, new)
        elif isinstance(new, int | float) and new != old:
            for other in [
                other for key, other in sys.modules.items() if key.startswith("anomalib_sgfr")
            ]:
                if name in vars(other):
                    setattr(other, name, new)


def _graft_function(old: object, new: object) -> None:
    if isinstance(new, property):
        old, new = old.fget, new.fget  # type: ignore[union-attr]
    old, new = (inspect.unwrap(getattr(each, "__func__", each)) for each in (old, new))  # type: ignore[arg-type]
    if (
        isinstance(new, FunctionType)
        and new.__module__ == old.__module__
        and isinstance(old, FunctionType)
    ):
        old.__code__, old.__defaults__, old.__kwdefaults__ = (
            new.__code__,
            new.__defaults__,
            new.__kwdefaults__,
        )


class Mutation:
    """A plugin of pytest that runs the tests many times."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.known: dict[str, tuple[float, list[str]]] = {}  # by test, and what its file holds
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, list[str]] = {}  # of each test, the functions
        self.failed: list[str] = []
        self.score = 0.0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = session.items
        stored = self.arguments.baseline
        if stored and stored.exists():
            self.known = json.loads(stored.read_text())
        self.run_unchanged()
        if stored:
            stored.write_text(json.dumps(self.known))
        if self.failed:
            print("tests fail without a change:", *self.failed, sep="\n  ")
        else:
            self.run_mutants()
        return True

    def run_unchanged(self) -> None:
        held = {
            path: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            for path in {item.path for item in self.items}
        }
        files = set(map(str, SOURCES.values()))
        for item in self.items:
            called: set[str] = set()
            known = f"{held[item.path]} {item.nodeid}"
            if known in self.known:
                self.seconds[item.nodeid], self.calls[item.nodeid] = self.known[known]
                continue

            def note(frame: FrameType, event: str, _: object, called: set[str] = called) -> None:
                code = frame.f_code
                if event == "call" and code.co_filename in files:
                    name = code.co_qualname.split(".<locals>")[0]
                    called.add(f"{Path(code.co_filename).stem}:{name}()")

            began = time.process_time()
            sys.setprofile(note)
            reports = runtestprotocol(item, log=False, nextitem=None)
            sys.setprofile(None)
            self.seconds[item.nodeid], self.calls[item.nodeid] = (
                time.process_time() - began,
                sorted(called),
            )
            if any(report.failed for report in reports):
                self.failed.append(item.nodeid)
            else:
                self.known[known] = self.seconds[item.nodeid], self.calls[item.nodeid]

    def tests_for(self, mutant: Mutant) -> list[pytest.Item]:
        prefix = f"{mutant.module}:{mutant.function if mutant.function.endswith('()') else ''}"
        chosen, total = [], 0.0
        for item in sorted(self.items, key=lambda item: self.seconds[item.nodeid]):
            if any(call.startswith(prefix) for call in self.calls[item.nodeid]):
                total += self.seconds[item.nodeid]
                if total > self.arguments.budget:
                    break
                chosen.append(item)
        return chosen

    def start(self, mutant: Mutant) -> tuple[int, int]:
        """Run the tests of a mutant in a fork: its process, and where to read which test failed."""
        reading, writing = os.pipe()
        items = self.tests_for(mutant)
        child = os.fork()
        if child:
            os.close(writing)
            return child, reading
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(
                signal.ITIMER_PROF, 10.0 + 3.0 * sum(self.seconds[item.nodeid] for item in items)
            )
            resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))
            source = SOURCES[mutant.module].relative_to(ROOT).with_suffix("")
            graft(sys.modules[".".join(source.parts)], code_of(mutant))
            for item in items:
                if any(report.failed for report in runtestprotocol(item, log=False, nextitem=None)):
                    os.write(writing, item.nodeid.encode())
                    os._exit(1)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001  # a change may break anything
            os.write(writing, f"{type(error).__name__}: {error}"[:200].encode())
            os._exit(1)

    def run_mutants(self) -> None:
        arguments = self.arguments
        modules = [arguments.module] if arguments.module else sorted(SOURCES)
        every = [mutant for module in modules for mutant in mutants_of(module)]
        every = [
            mutant
            for mutant in every
            if not arguments.only or re.search(arguments.only, str(mutant))
        ]
        equivalent = [mutant for mutant in every if mutant.equivalent]
        chosen = [mutant for mutant in every if not mutant.equivalent]
        if not arguments.all and len(chosen) > arguments.sample:
            chosen = random.Random(arguments.seed).sample(chosen, arguments.sample)
        chosen.sort()
        waiting, running, killed = chosen[::-1], {}, {}
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                mutant = waiting.pop()
                child, reading = self.start(mutant)
                running[child] = mutant, reading
            child, status = os.waitpid(-1, 0)
            mutant, reading = running.pop(child)
            with os.fdopen(reading, errors="replace") as pipe:
                by = pipe.read()
            if status:
                killed[mutant] = by or f"ended by signal {os.waitstatus_to_exitcode(status)}"
            if arguments.verbose or not status:
                print(f"{mutant}\n    {killed.get(mutant, 'SURVIVED')}", flush=True)
        self.report(chosen, killed, len(every), len(equivalent))

    def report(
        self, chosen: list[Mutant], killed: dict[Mutant, str], number: int, equivalent: int
    ) -> None:
        of, dead = (Counter(mutant.module for mutant in some) for some in (chosen, killed))
        print()
        for module, total in sorted(of.items()):
            print(f"{module:18} {dead[module]:4} of {total:4}  {dead[module] / total:6.1%}")
        self.score = len(killed) / max(1, len(chosen))
        print(f"{'killed':18} {len(killed):4} of {len(chosen):4}  {self.score:6.1%}")
        print(f"{number} mutants, {equivalent} of them equivalent, {len(chosen)} tried")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=sorted(SOURCES), help="instead of all")
    parser.add_argument("--only", help="a regular expression for the mutants, as they are printed")
    parser.add_argument(
        "--sample", type=int, default=300, help="mutants to try (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=20.0,
        help="seconds of tests for each (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--all", action="store_true", help="try all of them")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="at a time (default: one for each core)"
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        help="file that keeps what the unchanged tests do for the next time",
    )
    parser.add_argument("--verbose", action="store_true", help="say what killed each mutant")
    parser.add_argument("tests", nargs="*", default=TESTS)
    arguments = parser.parse_args()
    mutation = Mutation(arguments)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    status = pytest.main([*options, *arguments.tests], plugins=[mutation])
    return status or int(bool(mutation.failed) or mutation.score < WANTED)


if __name__ == "__main__":
    sys.exit(main())
