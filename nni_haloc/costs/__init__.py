"""Cost tables, and the predictors that fill them: the cost of each layer at each rank."""
