"""What each candidate of each layer costs: cost tables and the predictors that fill them."""
