"""Training a compression policy against a frozen model: samples, subsets scored in one batch, Lightning modules."""
