"""Workers that misbehave: the real worker process with a `generate` that does what its prompt says. No torch.

deaths.py: it ends, or does not. words.py: what it says is not so. lies.py: what it shows is not so.
"""
