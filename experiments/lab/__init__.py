"""The policy lab: runs the job's cache manager on traces in virtual time, without a model, and computes bounds."""
