"""Teacher and student: the frozen model, the trained one, and which of their layers are compared."""
