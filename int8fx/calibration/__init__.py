"""Statistics of a model's inputs on data, and plans: a scheme for each layer."""
