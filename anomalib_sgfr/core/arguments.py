"""Types of arguments shared by the torch model and its Lightning wrapper."""

from typing import Literal

BankPer = Literal["layer", "stride"]
Copies = Literal["none", "mirrored", "turned"]
Pooling = Literal["binomial", "box"]
Solver = Literal["affine", "omp", "ridge"]
