"""The loop. The only place where scheduler, memory and model meet."""
