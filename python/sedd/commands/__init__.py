"""The commands of ``sedd``, one file per command."""
