"""Time, memory and arithmetic of a vision-language model, phase by phase, with and without compression."""
