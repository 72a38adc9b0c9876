"""Attention: kinds.py is the table of kinds, from q, k and v to the output; heads.py is multi-head self-attention."""
