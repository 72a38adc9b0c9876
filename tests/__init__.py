"""Tests, and the programs that they start in processes of their own."""

import gc

# Tracing makes many objects and few cycles of them. Python's own pace of looking for cycles took a tenth of the time.
gc.set_threshold(50_000, 20, 20)
