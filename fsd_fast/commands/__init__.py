"""The commands of ``fsd-fast``: one module each, with its flags and its function."""
