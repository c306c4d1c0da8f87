"""Building blocks of a decoder. They know sizes, not model families."""
