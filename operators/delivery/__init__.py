"""Every request is answered once: copies are dropped, and what earlier attempts of a job answered is found."""
