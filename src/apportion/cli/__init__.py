"""The command line: one file per command; `main` finds the command and turns user mistakes into one line."""
