"""Training: arguments, the Trainer, export, and the commands that use them."""
