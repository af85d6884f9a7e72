"""`make torture`, or `python -m benchmarks.torture`: random cases, thousands of them, in which nothing may go wrong.

    layers     random layers and nets, forward and backward, against fp64 masked dense
    files      altered files, read and run by a library under AddressSanitizer and UndefinedBehaviorSanitizer
    threads    training, inference and load_sparse from several threads, under ThreadSanitizer
    kills      `find`, `lab` and `export`, killed at random moments and begun again: the same bits at the end
    saves      full disks, folders that are none or cannot be written, signals: nothing is left half-written

A case is its part, a seed and its number: these decide all that it draws (but for the moments at which processes meet).
Cases run in a process of their own (`worker`), which may crash; `campaign` starts it again with the next case.
`sanitizers` builds the libraries, `altered` makes the files, `runs` says what of a run must not change.
"""
