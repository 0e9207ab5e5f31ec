"""What a run would do, read from files and shapes alone: stages, memory, time."""
