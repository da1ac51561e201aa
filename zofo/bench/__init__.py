"""The cost of a step: `zofo bench` measures steps and noise kernels in alternating rounds.

settings.py     the settings of a benchmark and their checks
models.py       the model, also with random weights, and its batch
contenders.py   one step of each method, by zofo and as published
timing.py       rounds that time each contender once, in rotating order
memory.py       peak memory, each contender in a process of its own
noise.py        the kernels beside torch's own operations
launch.py       connected processes of this machine
wire.py         the bytes that a step of several processes sends
results.py      medians, ratios and JSON of the samples
report.py       the tables
run.py          runs all measurements in order
"""
