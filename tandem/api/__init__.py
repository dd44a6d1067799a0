"""HTTP in, HTTP out: one file per family of routes. No torch, no scheduling, no SQL."""
