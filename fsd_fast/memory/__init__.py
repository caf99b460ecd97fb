"""The memories of the global inter-feature structure: one is built from the teacher, one trained with the student."""
