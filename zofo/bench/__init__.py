"""What a step costs: `zofo bench`, steps and noise kernels in one alternating run.

settings.py     what is asked for, checked whole
models.py       the model, also with random weights, and the batch
contenders.py   one step of each method, ours and as published
timing.py       rounds that time each contender once, in rotating order
memory.py       peak memory, each contender in a process of its own
noise.py        the kernels beside torch's own operations
results.py      samples -> medians, ratios, JSON
report.py       the tables
run.py          all of it, in order
"""
