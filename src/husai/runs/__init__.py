"""Run folders, cells, atomic writes, exit codes: what every script shares."""
