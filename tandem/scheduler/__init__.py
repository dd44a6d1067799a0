"""Which tokens next. Integers only: no torch, no clock, no I/O."""
