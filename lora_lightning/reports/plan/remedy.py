"""What to set where a training runs out of memory."""
