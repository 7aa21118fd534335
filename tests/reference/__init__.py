"""Slow judges: the equations as plain loops over lists, and random ragged batches to try them on."""
