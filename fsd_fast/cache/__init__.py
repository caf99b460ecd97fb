"""What the teacher computed for a training set, kept on disk."""
