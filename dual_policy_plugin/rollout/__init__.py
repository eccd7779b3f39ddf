"""Playing learner and NPCs together: who acts where, the steps, the episode figures."""
