"""Code that all scripts share: run folders, cells, atomic writes, exit codes."""
