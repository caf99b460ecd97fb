"""The Triton kernels without a GPU: their machine code, the bytes they move, and whether the tests notice a fault."""
