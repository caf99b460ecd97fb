"""Time, memory and accuracy of the ops against the reference, the released formulation, plain torch and peers."""
