"""InstructEdit: trained editors, their tasks, scores and gradient directions."""
