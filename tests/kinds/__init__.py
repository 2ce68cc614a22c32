"""Workers that misbehave: the real worker process with a `generate` that does what its prompt says. No torch."""
