"""What every alignment shares: models loaded, steps taken, state kept, processes and precision."""
