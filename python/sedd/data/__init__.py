"""Text and other data, as blocks of tokens."""
