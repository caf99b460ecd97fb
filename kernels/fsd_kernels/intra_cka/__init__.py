"""``intra_cka``: linear CKA between the tokens of student and teacher, sample by sample."""

from fsd_kernels.intra_cka.api import IntraCKA, intra_cka

__all__ = ["IntraCKA", "intra_cka"]
