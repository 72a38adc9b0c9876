"""The commands: python -m castling_jax COMMAND."""
