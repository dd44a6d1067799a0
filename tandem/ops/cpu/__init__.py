"""C++ kernels for x86 CPUs and the functions that call them, with the contracts of the ops they stand in for.

Here: building (`build.py`), choosing (`library.py`) and one file of wrappers per op. Not here: what an op means; that
is the torch code one folder up, which also runs wherever no kernel does.
"""
