"""The teacher memory: inertia, teacher passes, memory and time of building it."""
