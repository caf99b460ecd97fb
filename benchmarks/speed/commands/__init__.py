"""The commands that measure, predict and report speed: one module each, with its flags and its ``main``."""
