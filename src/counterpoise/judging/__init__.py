"""Which of two responses is better: preference models, rewards and chat endpoints as judges."""
