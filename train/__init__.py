"""How a model is post-trained: recipes, data, the loop, the stages, the command line."""
