"""The kernels for graphics cards, beside what they stand in for: on a card, or in Triton's
interpreter on a CPU.
"""

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_sgfr.core import clusters
from anomalib_sgfr.core import gpu as kernels
from anomalib_sgfr.core import gpu as on_card
from anomalib_sgfr.core import k_center as selection
from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.neighbours import search_index
from anomalib_sgfr.core.sampler import SubspaceSampler
from anomalib_sgfr.core.self_expression import affine_distance
from anomalib_sgfr.features.embedding import pool
from anomalib_sgfr.memory_bank import MemoryBank, residual_maps

triton = pytest.importorskip("triton", reason="this build of PyTorch comes without Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
runs = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu",
    reason="no GPU, and Triton is not interpreted in this process",
)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter() -> None:
    """Triton reads the variable when it is imported."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert ", 3 skipped" in done.stdout.splitlines()[-1], (
        done.stdout
    )  # this one, and what needs a compiler


def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_card, "serve", lambda _: False)


def lengths(embedding: Tensor, atoms: Tensor, num_atoms: int = 5, unit: float = 1.0) -> Tensor:
    index = search_index(atoms)
    columns, units = kernels.columns_of(index), torch.tensor(unit, device=DEVICE)
    return kernels.affine_lengths(embedding, index, columns, len(atoms), num_atoms, 1e-3, units)


@runs
@pytest.mark.parametrize(
    ("shape", "size", "num_atoms"),
    [
        ((2, 24, 5, 5), 1000, 5),
        ((1, 40, 4, 3), 1100, 5),
        ((1, 113, 3, 3), 1024, 3),
        ((1, 7, 1, 1), 6, 5),
        ((3, 16, 3, 3), 513, 7),
        ((1, 192, 2, 2), 30, 2),
    ],
)
def test_lengths_are_those_of_affine(shape: tuple[int, ...], size: int, num_atoms: int) -> None:
    atoms = (torch.randn(size, shape[1]) + 3.0).to(DEVICE)
    embedding = (torch.randn(shape) + 3.0).to(DEVICE)
    embedding[0, :, 0, 0] = atoms[size // 2] * 1.001
    found = lengths(embedding, atoms, num_atoms, 2.0)
    patches = embedding.flatten(2).transpose(1, 2).flatten(0, 1)
    expected = (
        affine_distance(patches.double(), atoms.double(), num_atoms, 1e-3)
        .reshape(found.shape)
        .float()
    )
    torch.testing.assert_close(2.0 * found, expected, rtol=1e-5, atol=1e-5)
    laid_out_otherwise = embedding.to(memory_format=torch.channels_last)
    assert torch.equal(lengths(laid_out_otherwise, atoms, num_atoms, 2.0), found)


@runs
def test_degenerate_banks_and_patches() -> None:
    atoms = torch.zeros(20, 8, device=DEVICE)
    atoms[10:] = 1.0  # copies, and zeros
    embedding = torch.zeros(1, 8, 1, 6, device=DEVICE)
    embedding[..., 1] = 1.0
    embedding[..., 2] = 2.0
    embedding[0, 0, 0, 3] = torch.nan
    embedding[0, 1, 0, 4] = torch.inf
    embedding[..., 5] = 1e20  # its square is not finite
    found = lengths(embedding, atoms)[0, 0, 0]
    expected = affine_distance(embedding[0, :, 0, :3].T, atoms, 5, 1e-3)
    torch.testing.assert_close(found[:3], expected, atol=1e-5, rtol=1e-5)
    assert not found[3:].isfinite().any()


@runs
def test_half_precision_is_read_as_it_is() -> None:
    atoms, embedding = (
        torch.randn(40, 8, device=DEVICE),
        torch.randn(1, 8, 2, 2, device=DEVICE).half(),
    )
    assert torch.equal(lengths(embedding, atoms), lengths(embedding.float(), atoms))


@runs
@pytest.mark.parametrize(
    "shape", [(1, 2, 20, 17), (1, 1, 1, 1), (1, 2, 1, 6), (2, 2, 3, 2), (0, 2, 3, 3)]
)
def test_binomial_averages(shape: tuple[int, ...]) -> None:
    feature = torch.randn(shape, device=DEVICE)
    expected = pool(feature.double()).float()
    for laid_out in (
        feature,
        feature.to(memory_format=torch.channels_last),
        feature.transpose(2, 3).clone().mT,
    ):
        torch.testing.assert_close(pool(laid_out), expected, rtol=1e-6, atol=1e-6)
        assert pool(laid_out.half()).dtype == torch.float16
        torch.testing.assert_close(pool(laid_out.half()).float(), expected, rtol=2e-3, atol=2e-3)
    if feature.numel():
        assert not torch.equal(kernels.binomial(feature), feature)
        assert torch.autograd.functional.jacobian(
            pool, feature[:1, :1, :3, :3]
        ).count_nonzero()  # not by a kernel
        feature[0, 0, 0, 0] = torch.nan
        assert torch.equal(pool(feature).isnan(), pool(feature.double()).isnan())


@runs
def test_a_bank_forgets_what_was_made_of_other_atoms() -> None:
    its_bank, embedding = MemoryBank().to(DEVICE), torch.randn(1, 8, 2, 2, device=DEVICE)
    found = []
    for _ in range(2):
        atoms = torch.randn(40, 8, device=DEVICE)
        its_bank.set(atoms)
        found.append(residual_maps([its_bank], [embedding])[0])
        torch.testing.assert_close(
            found[-1], lengths(embedding, its_bank.atoms, unit=float(its_bank.residual_scale))
        )
    assert not torch.equal(*found)
    assert pickle.loads(pickle.dumps(its_bank)).solver._columns is None


@runs
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_banks_use_them_compiled_too(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    banks = [MemoryBank().to(DEVICE), MemoryBank().to(DEVICE)]
    embeddings = [torch.randn(2, 24, 4, 4, device=DEVICE), torch.randn(2, 8, 2, 2, device=DEVICE)]
    for its_bank, part in zip(banks, embeddings, strict=True):
        its_bank.set(torch.randn(300, part.shape[1], device=DEVICE))
    assert all(
        its_bank.solver._runs_on_gpu(its_bank, part)
        for its_bank, part in zip(banks, embeddings, strict=True)
    )

    def run(*parts: Tensor) -> list[Tensor]:
        return residual_maps(banks, parts)

    step: Any = run if backend is None else torch.compile(run, fullgraph=True, backend=backend)
    found = step(*embeddings)
    _plain(monkeypatch)
    torch.testing.assert_close(found, run(*embeddings), rtol=1e-5, atol=1e-5)


def test_banks_go_without_where_there_is_none() -> None:
    embedding = torch.randn(1, 8, 2, 2, dtype=torch.float64)
    plain, wide = MemoryBank(), MemoryBank(num_atoms=8)
    for its_bank in (plain, wide):
        its_bank.set(torch.randn(30, 8))
        assert not its_bank.solver._runs_on_gpu(its_bank, embedding)
    assert not wide.solver._runs_on_gpu(wide, embedding.float())
    assert not kernels.fits(5, 5)  # no next atom
    assert kernels.fits(5, 20_000)
    assert not kernels.fits(5, 30_000)
    assert plain.solver._runs_on_gpu(plain, embedding.float()) == (INTERPRETED or embedding.is_cuda)


@runs
def test_the_search_of_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(700, 6, device=DEVICE)
    before = Clusters.of(points[:300])._replace(count=torch.randint(1, 50, (300,), device=DEVICE))
    for threshold in (0.0, 0.9, 100.0):
        monkeypatch.setattr(clusters, "_FIRST_STAGE", 64)
        found = clusters.assign(before, points[300:], threshold)
        with monkeypatch.context() as patched:
            _plain(patched)
            expected = clusters.assign(before, points[300:], threshold)
        assert torch.equal(found.atoms, expected.atoms)
        assert torch.equal(found.count, expected.count)
        torch.testing.assert_close(list(found), list(expected))


@runs
def test_the_greedy_choices_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(700, 3, device=DEVICE)
    points[100:200] = points[300:400]  # duplicates are never taken
    for size, tolerance in ((40, 0.0), (400, 0.5), (700, 0.0)):
        taken, radius = selection.k_center_greedy(points, size, tolerance=tolerance)
        apart = selection.greedy_separated(points, 0.3)
        with monkeypatch.context() as patched:
            _plain(patched)
            expected, its_radius = selection.k_center_greedy(points, size, tolerance=tolerance)
            assert torch.equal(taken, expected)
            assert radius == pytest.approx(its_radius, abs=1e-6)
            assert torch.equal(apart, selection.greedy_separated(points, 0.3))


@runs
def test_a_stream_is_learnt_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal embeddings, equal banks."""
    stream = torch.randn(1500, 5).cumsum(1).to(DEVICE)

    def learn() -> Clusters:
        sampler = SubspaceSampler(60, working_size=200)
        for batch in stream.split(150):
            sampler.observe(batch)
        return sampler.clusters()

    found = learn()
    _plain(monkeypatch)
    torch.testing.assert_close(list(found), list(learn()), equal_nan=True)


@runs
def test_what_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_card, "_tried", on_card._tried.__wrapped__)
    assert on_card._tried()
    for broken, reason in (
        (lambda *_: torch.zeros(20, dtype=torch.bool, device=DEVICE), "what it computes is wrong"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
    ):
        monkeypatch.setattr(kernels, "separated_points", broken)
        with pytest.warns(RuntimeWarning, match=reason):
            assert not on_card._tried()


def test_without_a_card_nobody_is_warned() -> None:
    if DEVICE.type == "cpu" and not INTERPRETED:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not on_card.serve(torch.zeros(1))
            assert not on_card._tried()


def test_nobody_waits_for_imports_of_a_compiler() -> None:
    program = (
        "import sys, anomalib_sgfr.core.gpu; print({'triton', 'torch._dynamo'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )


@pytest.mark.skipif(INTERPRETED, reason="an interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_cards_that_are_not_here(
    capability: int, tmp_path: Path, monkeypatch: Any
) -> None:
    """What a GPU program needs can be told without a GPU."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anomalib_sgfr.core import triton_kernels as programs

    sizes = {"POINTS": 16, "GROUPS": 512, "SUPPORT": 8, "STEP": kernels._STEP}
    sizes |= {"K": 5, "CANDIDATES": 64, "SHORT": 8}
    search = {"ROWS": kernels._ROWS, "ATOMS": kernels._ATOMS, "STEP": kernels._STEP}
    for kernel, constants, options in (
        (programs.affine_lengths, sizes, kernels._FEW),
        (programs.affine_lengths, sizes, kernels._MANY),
        (programs.staged_nearest, search, {"num_warps": 8, "num_stages": 2}),
        (programs.binomial, {"PLACES": kernels._PLACES}, {"num_warps": 4}),
        (programs.farthest_points, {"SIZE": 512}, {"num_warps": 1}),
        (programs.separated_points, {"SIZE": 512}, {"num_warps": 1}),
    ):
        types = {"index_ptr": "*i64", "taken_ptr": "*i64", "kept_ptr": "*i8"}
        scalars = dict.fromkeys(("regularisation", "limit", "tolerated", "nearest"), "fp32")
        signature = {
            name: (
                "constexpr"
                if name in constants
                else types.get(name, scalars.get(name, "*fp32" if name.endswith("_ptr") else "i32"))
            )
            for name in kernel.arg_names
        }
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.metadata.shared <= 99 * 1024  # what any GPU of these has
        assert np.frombuffer(made.asm["cubin"], np.uint8).any()
