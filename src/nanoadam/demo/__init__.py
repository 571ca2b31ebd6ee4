"""The first run: two tasks of real digits, and what is left of the first."""
