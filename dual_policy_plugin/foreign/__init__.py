"""Where somebody else's arrays, spaces and nets become ours: the edge of the public API."""
