"""`make gpu`, or `python -m benchmarks.gpu`: the tests of the GPU kernels, then what they are worth on this GPU.

    bars       what is promised, of which rows       cases      what is measured, in which order
    problems   one masked layer with its truth       nets       whole training steps
    baselines  ours and what it is measured against  timing     checks, CUDA graphs, medians
    roofline   what the GPU could do                 prepare    kernels compiled ahead
    runner     budgets of seconds                    worker     a process that may die
    tests      the tests of the kernels, by shard    shard      what pytest does in one
    tune       launch shapes around the defaults     profile    what a call is made of
    probe      would a 2:4 cover pay?                calls      one op of a layer, which these three run
    rows       the files of a run                    summary    the tables and bars of those files
    sanitize   make gpu-sanitize                     lab        make gpu-lab

Nothing is installed, fetched or built for it: a checkout, torch with CUDA, Triton and what the tests import.
`python -m benchmarks.gpu.summary [DIR]` prints the tables again.
"""
