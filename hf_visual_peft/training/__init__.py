"""What a training loop asks: which parameters, which settings, and what to do with the weights afterwards."""
