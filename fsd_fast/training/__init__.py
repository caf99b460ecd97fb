"""Training: the Trainer, its checkpoints, and the export of the student."""
