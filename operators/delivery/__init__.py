"""One outcome per request: copies are dropped, and answers of earlier attempts of the job are found."""
