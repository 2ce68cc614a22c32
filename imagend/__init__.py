"""imagend paints what signed job files ask for. Start reading at ARCHITECTURE.md."""

__version__ = "0.1.0"
