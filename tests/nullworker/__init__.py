"""A worker that paints at once: the real worker process, with a `generate` that writes a small PNG. No torch."""
