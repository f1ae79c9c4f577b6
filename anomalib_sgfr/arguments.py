"""Types of arguments shared by the torch model and its Lightning wrapper."""

from typing import Literal

Solver = Literal["affine", "omp", "ridge"]
