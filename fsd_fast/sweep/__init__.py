"""Many runs from one file: the file, the processes that do the runs, their results, and tables of them."""
