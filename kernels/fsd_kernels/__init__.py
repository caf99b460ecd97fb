"""Fused linear-CKA, Gram-matrix and k-means operations on transformer features; torch and Triton only.

Every op takes ``backend`` in {"auto", "triton", "eager", "reference"}; see ``fsd_kernels._backend``. An op is a folder:
its public functions (``api``), the plain formula (``reference``), restructured torch operations (``eager``) and fused
kernels (``triton``). Implementations are imported on first use, so that importing this package needs torch alone.
"""

from fsd_kernels._backend import resolve_backend
from fsd_kernels.gram import GramBasis, frozen_gram, gram
from fsd_kernels.intra_cka import IntraCKA, intra_cka
from fsd_kernels.kmeans import assign, nearest, update
from fsd_kernels.structure import InterStructure, inter_structure, structure

__all__ = [
    "GramBasis",
    "InterStructure",
    "IntraCKA",
    "assign",
    "frozen_gram",
    "gram",
    "inter_structure",
    "intra_cka",
    "nearest",
    "resolve_backend",
    "structure",
    "update",
]
