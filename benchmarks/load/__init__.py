"""Load: a memory of as many samples as MNLI has, and a run of 10,000 steps."""
