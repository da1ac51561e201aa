"""Tables, comparisons and verdicts over finished runs."""
