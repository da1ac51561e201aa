"""Tasks: rows become prompt, candidates and gold; or text to be written.

A built-in task brings its rows, prompt and sizes. `classification`, `completion` and `chat` take
the user's own rows. `zofo.tasks.load` finds a task by its name.
"""
