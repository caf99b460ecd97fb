"""Speed, memory and accuracy of the losses against the reference, the released formulation, plain torch and peers.

``python -m benchmarks --help`` lists the commands. Nothing is timed that is wrong: ``gate`` first compares every
provider's value and gradient with the reference in float64. Never installed.
"""
