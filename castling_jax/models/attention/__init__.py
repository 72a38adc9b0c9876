"""Attention: kinds.py is the table of kinds, from q, k and v to the output; heads.py is multi-head self-attention.

The other files are modules that some kinds bring in the place of multi-head self-attention, one a file.
"""
