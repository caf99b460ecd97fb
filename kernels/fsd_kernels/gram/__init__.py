"""``gram``: the one small matrix from which every between-sample structure is read."""

from fsd_kernels.gram.api import GramBasis, frozen_gram, gram

__all__ = ["GramBasis", "frozen_gram", "gram"]
