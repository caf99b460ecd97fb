"""Speed, memory and accuracy of the losses and of k-means. Never installed.

python -m benchmarks OP[,OP] [...]       measure intra, local, global, fsd_ilg, kmeans, step or all
python -m benchmarks --check             measure the cases of the performance targets and check them
python -m benchmarks bench [...]         measure everything and write the result and its report
python -m benchmarks cost [...]          predict bytes, flops, launches and times on a device that is not here
python -m benchmarks report FILE         write the Markdown report of a result
python -m benchmarks compare A B         list the times that changed by more than the spread
python -m benchmarks gpu-session [...]   everything that a GPU has to show, in order of value, in nine minutes
python -m benchmarks kernels-report | traffic | rounding | mutate [...]
python -m benchmarks memory | train | load | kernel-times | enqueue | capture | rkd [...]

Every provider is compared with the reference in float64 before it is timed; a wrong one is not timed.
"""
