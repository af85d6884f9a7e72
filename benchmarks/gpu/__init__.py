"""`make gpu`, or `python -m benchmarks.gpu`: the tests of the GPU kernels, then what they are worth on this GPU.

    bars       what is promised, of which rows       cases      what is measured, in which order
    problems   one masked layer with its truth       nets       whole training steps
    baselines  ours and what it is measured against  timing     checks, CUDA graphs, medians
    roofline   what the GPU could do                 runner     the budget of seconds, processes that may die
    rows       results/<gpu>/gpu-*.csv               summary    the tables of those files

Nothing is installed, fetched or built for it: a checkout, torch with CUDA, Triton and what the tests import.
`python -m benchmarks.gpu.summary [DIR]` prints the tables again.
"""
