"""The losses of feature structure distillation."""
