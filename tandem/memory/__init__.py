"""Who owns which bytes. `blocks` and `adapters` count in integers; only `arena` allocates tensors."""
