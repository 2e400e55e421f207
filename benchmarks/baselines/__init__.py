"""What an engineer writes today instead of a job of ours: each runs in processes of its own on the same model."""
