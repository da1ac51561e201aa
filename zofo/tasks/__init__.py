"""Tasks turn rows into a prompt with candidates, or into a text that the model learns to write.

A built-in task comes with rows, prompt and sizes. `classification`, `completion` and `chat` take
the user's own rows. `zofo.tasks.load` finds a task by its name.
"""
