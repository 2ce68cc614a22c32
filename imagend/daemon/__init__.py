"""Process 1: it decides. It owns spool/ and outputs/, and never imports the engine."""
