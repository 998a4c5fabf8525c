"""Plans runs for TPUs without having one: memory, cost and fit of a step, from the TPU compiler itself."""
