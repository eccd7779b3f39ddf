"""The report of runs as one self-contained HTML page: what a directory holds, its curves, its tables."""
