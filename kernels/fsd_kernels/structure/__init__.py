"""The between-sample structures: ``inter_structure`` of features, ``structure`` of two Gamma matrices."""

from fsd_kernels.structure.api import InterStructure, inter_structure, structure

__all__ = ["InterStructure", "inter_structure", "structure"]
