"""What a training costs, and what to train in the time there is."""
