"""Tasks: what a model learns from a batch, and how its answers are judged. `task.py` says what every task has."""
