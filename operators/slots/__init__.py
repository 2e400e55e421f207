"""An inference slot, the process that it lives in, and what keeps that alive."""
