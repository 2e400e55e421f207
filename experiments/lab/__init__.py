"""The policy laboratory: traces against the very cache manager in virtual time, without a model, beside bounds."""
