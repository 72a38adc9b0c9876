"""What a person runs: python -m castling_jax.tools.NAME."""
