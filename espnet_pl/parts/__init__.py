"""State that outlives a step, and tools with a model inside."""
