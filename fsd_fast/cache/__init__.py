"""What the teacher computed, kept on disk."""
