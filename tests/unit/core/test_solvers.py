"""A solver that a user adds in one module fits, scores, certifies and explains."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from anomalib_sgfr import Sgfr, explain
from anomalib_sgfr.core.clusters import Clusters
from anomalib_sgfr.core.solvers import (
    SOLVERS,
    AffineSolver,
    Bound,
    Solver,
    SolverName,
    find_solver,
)
from tests.conftest import fit, folder_datamodule, small


class NearestSolver(Solver):
    """Nearest atom alone, at twice the distance."""

    arguments = ()

    def residual_norm(self, patches: Tensor, atoms: Tensor) -> Tensor:
        return 2.0 * torch.cdist(patches, atoms).amin(1)

    def code(self, patches: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        support = torch.cdist(patches, atoms).argmin(1, keepdim=True)
        return support, torch.ones_like(support, dtype=patches.dtype)

    def bound(self, clusters: Clusters) -> Bound:
        del clusters
        return lambda distance: 2.0 * distance + 1e-3


def test_a_registered_solver_fits_scores_certifies_and_explains(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOLVERS, "nearest", NearestSolver)
    model = small(solver="nearest", image_size=64)
    engine = fit(model, folder_datamodule(parts), tmp_path)
    restored = Sgfr.load_from_checkpoint(engine.best_model_path).model.eval()
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        found = restored(image[None])
    assert torch.equal(found.anomaly_map, model.model.eval()(image[None]).anomaly_map)
    explained = explain(restored, image, 1).regions[0]
    for part in explained.reconstructions:
        (contribution,) = part.contributions
        scale = float(restored.banks[part.scale].residual_scale)
        assert part.residual * scale == pytest.approx(2.0 * contribution.distance, rel=1e-2)
    assert 0 < restored.certificate().largest < float("inf")


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(ValueError, match="solver must be one of affine, omp, ridge, got 'lasso'"):
        find_solver("lasso")


def test_the_command_line_offers_every_solver() -> None:
    assert get_args(SolverName) == tuple(SOLVERS)


def test_a_solver_without_a_bound_is_no_solver() -> None:
    class Incomplete(AffineSolver):
        bound = Solver.bound  # abstract

    with pytest.raises(TypeError, match="abstract method"):
        Incomplete()


@pytest.mark.parametrize("name", SOLVERS)
def test_the_code_leaves_the_residual(name: str) -> None:
    """The atoms that explain a patch, by their coefficients, leave what is scored."""
    patches, atoms = torch.randn(40, 6), torch.randn(5, 6)  # ridge names five atoms: here all
    solver = find_solver(name)(num_atoms=3)
    solver.prepare(atoms)
    support, code = solver.code(patches, atoms)
    assert support.dtype == torch.int64
    rebuilt = (code[..., None] * atoms[support]).sum(1)
    expected = solver.residual_norm(patches, atoms)
    torch.testing.assert_close((patches - rebuilt).norm(dim=1), expected, rtol=1e-4, atol=1e-5)
