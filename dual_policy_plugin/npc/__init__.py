"""From the text that names an NPC to verified bytes: uri -> sources -> resolver, with a lock. Never imports torch."""
