"""Many clips, one row each: inputs, decoding ahead of the model, and parts that a killed run goes on from."""
