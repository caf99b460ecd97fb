"""One session on a GPU: the stages in order of value, what was wanted of each, and what was found."""
