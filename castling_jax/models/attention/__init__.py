"""Attention: kinds.py is the table of kinds, from q, k and v to the output; heads.py is multi-head self-attention.

core.py defines a kind, and linear.py has the functions of the linear kinds from other papers. Each of the other files
is a module that replaces multi-head self-attention in one kind.
"""
