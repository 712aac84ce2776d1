"""The study's loop: runs, their measurements, checkpoints, results and plans."""
