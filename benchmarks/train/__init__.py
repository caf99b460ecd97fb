"""Whole training runs: what dynamic length, the teacher cache, half precision and the structures bring or cost."""
