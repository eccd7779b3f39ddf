"""Several processes that train one policy: who is who, what they share, and how they notice that one is gone."""
