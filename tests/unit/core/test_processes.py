"""Collectives, and that no module talks to other processes by itself or under a condition of its
own.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import anomalib_sgfr
from anomalib_sgfr.core import processes
from anomalib_sgfr.core.processes import (
    failing_together,
    gathered,
    gathered_tensors,
    several,
    share,
    summed,
)
from tests.threaded import in_threads

PACKAGE = Path(anomalib_sgfr.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != Path(processes.__file__))


def test_alone_each_gives_what_it_was_given() -> None:
    tensor = torch.arange(3.0)
    assert not several()
    assert share([1, 2]) == [1, 2]
    assert gathered("a") == ["a"]
    assert torch.equal(gathered_tensors([tensor])[0][0], tensor)
    assert torch.equal(summed(tensor), tensor)
    with failing_together():
        pass


def test_values_come_in_the_order_of_the_ranks() -> None:
    assert (
        in_threads(lambda rank: gathered({"rank": rank}))
        == [[{"rank": rank} for rank in range(3)]] * 3
    )


@pytest.mark.parametrize(
    ("items", "shares"),
    [([], [[], [], []]), ([5], [[5], [], []]), ([5, 6, 7, 8], [[5, 8], [6], [7]])],
)
def test_all_have_their_share_of_the_work(items: list[int], shares: list[list[int]]) -> None:
    assert in_threads(lambda _: share(items)) == shares


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool]
)
def test_tensors_may_differ_in_shape_and_be_missing(dtype: torch.dtype) -> None:
    rows = [torch.empty(0), torch.ones(2, 3, dtype=dtype), torch.zeros(1, 4, dtype=dtype)]
    for ended in in_threads(lambda rank: gathered_tensors([rows[rank], torch.tensor(rank)])):
        assert [tuple(part.shape) for part, _ in ended] == [(0, 3), (2, 3), (1, 4)]
        assert all(part.dtype == dtype for part, _ in ended)
        assert torch.equal(ended[1][0], rows[1])
        assert torch.equal(ended[2][0], rows[2])
        assert [int(number) for _, number in ended] == [0, 1, 2]


def test_no_process_need_have_a_tensor_with_values() -> None:
    for ended in in_threads(
        lambda rank: gathered_tensors([torch.empty((0, 7) if rank == 1 else (0,))])
    ):
        assert [tuple(part.shape) for (part,) in ended] == [(0, 7)] * 3
    assert in_threads(lambda _: gathered_tensors([])) == [[[], [], []]] * 3


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ([[torch.ones(1)], [], [torch.ones(1)]], "different numbers of tensors"),
        ([[torch.ones(1)], [torch.ones(1).double()], [torch.empty(0)]], "cannot be joined"),
        ([[torch.ones(1)], [torch.ones(1, 1)], [torch.empty(0)]], "cannot be joined"),
    ],
)
def test_tensors_that_cannot_be_joined_are_refused_in_all(
    theirs: list[list[torch.Tensor]], message: str
) -> None:
    for ended in in_threads(lambda rank: gathered_tensors(theirs[rank])):
        assert isinstance(ended, ValueError)
        assert message in str(ended)


def test_sums_are_of_all_and_leave_what_was_given() -> None:
    def total(rank: int) -> list[int]:
        own = torch.tensor([rank, 1])
        found = summed(own)
        assert own.tolist() == [rank, 1]
        return found.tolist()

    assert in_threads(total) == [[3, 3]] * 3


class Odd(Exception):  # noqa: N818
    """One that cannot be restored from a pickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


@pytest.mark.parametrize(
    ("error", "type_", "message"),
    [
        (FileNotFoundError("no image in 'held'"), FileNotFoundError, "no image in 'held'"),
        (Odd("a", "b"), RuntimeError, "Odd: ab"),
    ],
)
def test_all_raise_what_one_raises(error: Exception, type_: type[Exception], message: str) -> None:
    def work(rank: int) -> str:
        with failing_together():
            if rank == 1:
                raise error
        return "went on"

    ended = in_threads(work)
    assert all(str(its) in {message, str(error)} for its in ended)
    assert all(isinstance(its, type_ | type(error)) for its in ended)
    assert isinstance(ended[0], type_)


def test_errors_that_differ_become_the_first() -> None:
    def work(rank: int) -> None:
        with failing_together():
            if rank:
                raise ValueError(str(rank))

    assert [str(its) for its in in_threads(work)] == ["1", "1", "1"]


def test_a_collective_where_one_may_fail_alone_is_refused_also_without_other_processes() -> None:
    for collective in (
        lambda: gathered(1),
        lambda: summed(torch.ones(1)),
        lambda: gathered_tensors([]),
    ):
        with pytest.raises(RuntimeError, match="before or after"), failing_together():
            collective()
    assert gathered(1) == [1]  # afterwards it is allowed again


# Names of torch, torchmetrics and Lightning that let processes wait for each other
OTHERS = {
    *(
        "all_gather",
        "all_gather_object",
        "all_reduce",
        "all_to_all",
        "barrier",
        "broadcast",
        "broadcast_object_list",
    ),
    *(
        "gather_all_tensors",
        "gather_object",
        "reduce_boolean_decision",
        "reduce_scatter",
        "sync_dist",
        "sync_ddp",
    ),
}
OURS = {"failing_together", "gathered", "gathered_tensors", "gather_scores", "summed", "unite"}


def talks(tree: ast.AST) -> list[str]:
    """What a module uses to talk to other processes without this one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.startswith("torch.distributed")]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{name.name}" for name in node.names]
            found += [name for name in whole if name.startswith("torch.distributed")]
        elif isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == (
                "torch",
                "distributed",
            ):
                found.append("torch.distributed")
            elif node.attr in OTHERS:
                found.append(node.attr)
        elif isinstance(node, ast.keyword) and node.arg in OTHERS:
            found.append(node.arg)
    return found


def collective_in(node: ast.AST) -> bool:
    """Whether a collective is called, or other processes are counted: what follows is the same in
    all of them.
    """
    called = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    return any(isinstance(name, ast.Name) and name.id in {*OURS, "several"} for name in called)


def guarded(body: list[ast.stmt], conditional: bool = False) -> list[int]:
    """Lines of a function that call a collective not every process need come by."""
    found: list[int] = []
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found += guarded(statement.body)
            continue
        blocks = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        inner = [part for block in blocks for part in block]
        heads = [
            child
            for child in ast.iter_child_nodes(statement)
            if not isinstance(child, ast.stmt | ast.excepthandler)
        ]
        for head in heads:
            found += calls(head, conditional or isinstance(statement, ast.While))
        same = isinstance(statement, ast.With) or (
            isinstance(statement, ast.If) and collective_in(statement.test)
        )
        found += guarded(inner, conditional or not same)
        leaves = any(
            isinstance(part, ast.Return | ast.Raise | ast.Break | ast.Continue)
            for part in ast.walk(statement)
        )
        conditional = conditional or bool(inner and leaves and not same)
    return found


def calls(node: ast.AST, conditional: bool) -> list[int]:
    """Lines of an expression with a collective under a condition, its own or an outer one."""
    found = []
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in OURS
        and conditional
    ):
        found.append(node.lineno)
    for name, field in ast.iter_fields(node):
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                other = (
                    isinstance(node, ast.Lambda)
                    or (isinstance(node, ast.IfExp) and name != "test")
                    or (isinstance(node, ast.BoolOp) and child is not node.values[0])
                    or (
                        isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp)
                        and name == "elt"
                    )
                    or (isinstance(node, ast.DictComp) and name in {"key", "value"})
                )
                found += calls(child, conditional or other)
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_other_module_talks_to_processes_and_none_under_a_condition(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert not talks(tree)
    assert not guarded(tree.body), "call the collective in every process, before any condition"


@pytest.mark.parametrize(
    ("body", "lines"),
    [
        ("    return gathered(found)", []),
        (
            (
                "    if not sum(gathered(found)):\n        raise ValueError\n    with agreed():\n  "
                "      work()"
            ),
            [],
        ),
        ("    every = [part for (part,) in gathered_tensors(found)]", []),
        ("    if several():\n        return summed(found)", []),
        ("    if found:\n        return gathered(found)", [3]),
        ("    if not found:\n        return []\n    return gathered(found)", [4]),
        ("    return gathered(found) if found else []", [2]),
        ("    return found and gathered(found)", [2]),
        ("    for part in found:\n        gathered(part)", [3]),
        ("    return [gathered(part) for part in found]", [2]),
        ("    while summed(found):\n        pass", [2]),
        ("    try:\n        work()\n    except ValueError:\n        gathered(found)", [5]),
        ("    return lambda: summed(found)", [2]),
    ],
)
def test_a_guarded_collective_is_found(body: str, lines: list[int]) -> None:
    assert guarded(ast.parse(f"def function(found):\n{body}\n").body) == lines


@pytest.mark.parametrize(
    "line",
    [
        "from torch import distributed",
        "import torch.distributed as dist",
        "from torch.distributed import all_reduce",
        "torch.distributed.barrier()",
        "trainer.strategy.broadcast(name)",
        "self.log('loss', loss, sync_dist=True)",
    ],
)
def test_other_ways_to_talk_are_found(line: str) -> None:
    assert talks(ast.parse(line))


def test_names_that_are_looked_for_are_there() -> None:
    every = {name for name in processes.__all__ if name not in {"several", "share"}}
    assert every <= OURS
    defined: set[Any] = set()
    for module in [Path(processes.__file__), *MODULES]:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        defined |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert defined >= OURS
