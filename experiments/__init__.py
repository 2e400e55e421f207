"""From named variants of a job to raw records, and from those to CSV and figure. Starts jobs by submission only."""
