"""Process 2: it paints. It writes only into the folder it is handed, and never opens the spool."""
