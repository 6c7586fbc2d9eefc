"""How good a network becomes with so much work: recipes and peers, with the same tiles and budget.

A contestant sees a number of pixels, or computes for so many seconds, and then says a class for every
pixel of the same validation tiles; one count of hits and misses scores all of them. Each run is one of
several seeds, in a process of its own, and tables are made of its line in a file of results alone:

    python -m benchmarks.accuracy run            # hours; what is in the file is not run again
    python -m benchmarks.accuracy table          # Markdown

`task` has the data and the budget, `contestants` who takes part, `ingredients` what is switched on and
off, `bench` runs what is missing, `results` keeps it and `tables` prints it.
"""
