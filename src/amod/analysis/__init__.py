"""What the trained and the untrained models can be asked: their speed, their routing, their convergence."""
