"""Games to look at: recorded as evaluation plays them, written as one page or as a GIF."""
