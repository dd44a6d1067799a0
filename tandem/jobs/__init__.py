"""Fine-tuning jobs and all else that must survive a restart: files, adapters, aliases. No torch, no HTTP."""
