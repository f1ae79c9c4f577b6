"""Types of arguments shared by the torch model and its Lightning wrapper."""

from typing import Literal

Copies = Literal["none", "mirrored", "turned"]
Solver = Literal["affine", "omp", "ridge"]
