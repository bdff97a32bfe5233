"""What runs: model adapters, the `VLM` facade, pictures of kept tokens, and the training of the shipped model."""
