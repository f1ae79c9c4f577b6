"""Types of arguments shared by the torch model and its Lightning wrapper."""

from typing import Literal

Pooling = Literal["binomial", "box"]
Solver = Literal["affine", "omp", "ridge"]
